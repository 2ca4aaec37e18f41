"""What is checked without running it: every command's options, settings, links, and JSON."""

from __future__ import annotations

import itertools
import re
import tomllib

import pytest
import typer

from kvrag.bench.cli import app as bench_app
from kvrag.cli.arguments import moved_to_front
from kvrag.cli.main import app
from kvrag.cli.serve import serve
from kvrag.config import Settings

from .pages import LANGUAGES, PAGES, ROOT, blocks, command_lines, inline_commands, text_of
from .test_pages_run import RUN, shown

#: What is an argument's place in a command, and no argument.
_PLACEHOLDER = re.compile(r"…|\[.*\]?$|.*\]$")
#: Errors of what is right as far as it goes. By name: Typer brings a parser of its own.
_INCOMPLETE = ("MissingParameter", "NoArgsIsHelpError", "BadOptionUsage")
#: Behind `kvrag`, no commands but what keys are derived with (docs/security.md).
_DERIVATIONS = ("namespace", "sealing", "key", "header", "segment")
_ROOT, _BENCH = typer.main.get_command(app), typer.main.get_command(bench_app)
_SHOWS_A_COMMAND = re.compile(rf"\$ |(pip|curl|make|docker) |kvrag ({'|'.join(_ROOT.commands)})\b")
#: Blocks that no test runs, by page. One more is a decision.
NOT_RUN = {
    "CONTRIBUTING.md": 1,
    "README.md": 1,
    "docs/benchmarks.md": 6,
    "docs/cli.md": 1,
    "docs/for-lmcache-and-vllm-users.md": 2,
    "docs/fusion.md": 1,
    "docs/index.md": 1,
    "docs/langchain.md": 2,
    "docs/models.md": 3,
    "docs/operations.md": 1,
    "docs/rest.md": 1,
    "docs/security.md": 1,
    "docs/store.md": 1,
    "docs/tuning.md": 1,
}


def words_of(page: str) -> list[list[str]]:
    scripts = [block.text for block in blocks(page) if block.language == "bash"]
    commands = [command for script in scripts for command in command_lines(script)]
    units = [block.text for block in blocks(page) if block.language == "ini"]
    commands += [re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1].split() for unit in units]
    ours = [command for command in commands if command[0].endswith("kvrag")]
    return ours + [words for words in inline_commands(page) if words[1] not in _DERIVATIONS]


def parse(words: list[str]) -> None:
    """Parse a command line as the program does, and run nothing. Raises its parser's errors."""
    command = _ROOT
    arguments = [word for word in words[1:] if not _PLACEHOLDER.fullmatch(word)]
    options = [option for option in command.params if not option.is_eager]
    with_value = [name for option in options if not option.is_flag for name in option.opts]
    flags = [name for option in options if option.is_flag for name in option.opts]
    left = moved_to_front(arguments, with_value=with_value, flags=flags)
    context = None
    while True:
        if context is not None and context.info_name in ("serve", "bench"):
            command = _BENCH if context.info_name == "bench" else _serving()
        context = command.make_context(words[0], list(left), parent=context)
        left = [*context._protected_args, *context.args]
        if not left or not hasattr(command, "resolve_command"):
            return
        _, command, left = command.resolve_command(context, left)
        assert command is not None
        if "--help" in left:
            return


def _serving() -> typer.Typer:
    serving = typer.Typer(add_completion=False)
    serving.command()(serve)
    return serving


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page):
    for words in words_of(page):
        try:
            parse(words)
        except Exception as exc:
            # Prose names a command without its arguments, a group without its commands.
            if type(exc).__name__ not in _INCOMPLETE:
                pytest.fail(f"{page}: {' '.join(words)}: {exc!r}")


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page):
    names = {name.lower() for name in re.findall(r"\bKVRAG_([A-Z][A-Z_]*[A-Z])\b", text_of(page))}
    names |= {
        name for block in blocks(page) if block.language == "toml" for name in toml(block.text)
    }
    for words in words_of(page):
        pairs = itertools.pairwise(words)
        names |= {value.partition("=")[0] for option, value in pairs if option == "--set"}
    known = set(Settings.model_fields) | {"config", "test_models"}
    assert not {name for name in names if name not in known and "…" not in name}


def toml(text: str) -> list[str]:
    return list(tomllib.loads(text))


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_what_they_are_and_json_is_json(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if block.language == "json":
            shown(block.text)
        if block.language == "text":
            assert not _SHOWS_A_COMMAND.match(block.text), block
    fences = re.findall(r"^ *```", text_of(page), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page))


def test_what_is_not_run_says_why():
    counts: dict[str, int] = {}
    for block in (block for page in PAGES for block in blocks(page)):
        if block.reason is not None:
            assert block.language in RUN, f"{block} would not be run anyway"
            assert len(block.reason.split()) >= 3, f"{block} is not run, and no reason is given"
            counts[block.page] = counts.get(block.page, 0) + 1
    assert counts == NOT_RUN


@pytest.mark.parametrize("page", PAGES)
def test_extras_exist(page):
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for names in re.findall(r"\b(?:kvrag|\.)\[([\w,]+)\]", text_of(page)):
        assert set(names.split(",")) <= extras.keys(), (page, names)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Files and headings, as a git host finds them; the site's build checks its own."""
    text = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), (page, link)
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), (page, link)


def anchors(text: str) -> set[str]:
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
