"""What pages hold: fenced blocks of commands and snippets, and commands within the text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: A reader's pages, those of the site among them, as paths below the repository.
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (
        *sorted(ROOT.glob("docs/*.md")),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    )
]
#: `text` is what a program prints, or a picture: it is shown and not run. `ini` is systemd's.
LANGUAGES = ("bash", "python", "json", "toml", "ini", "text")

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.*?) -->\n+)?(?P<indent> *)```(?P<language>\w*)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block. `reason`: why it is not run; None if it is."""

    page: str
    line: int
    indent: str
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The page's fenced blocks, in their order."""
    text = text_of(page)
    return [
        Block(
            page,
            text.count("\n", 0, match.start("language")) + 1,
            match["indent"],
            match["language"],
            match["text"],
            match["reason"],
        )
        for match in _FENCE.finditer(text)
    ]


def command_lines(script: str) -> list[list[str]]:
    """The simple commands of a shell script, as words, without variables set for one command."""
    found: list[list[str]] = []
    for line in _logical_lines(script):
        command: list[str] = []
        for word in [*_words(line), ";"]:
            if not set(word) <= set("|;&()"):
                command.append(word)
                continue
            while command and re.match(r"\w+=", command[0]):
                command.pop(0)
            if command:
                found.append(command)
            command = []
    return found


def _logical_lines(script: str) -> Iterator[str]:
    """Lines with those that a backslash or an open quotation joins to them."""
    open_line = ""
    for line in re.sub(r"\\\n\s*", " ", script).splitlines():
        open_line += line
        try:
            _words(open_line)
        except ValueError:
            open_line += "\n"
        else:
            yield open_line
            open_line = ""
    assert not open_line, script


def _words(line: str) -> list[str]:
    """Raises ValueError if a quotation is open at the end."""
    words = shlex.shlex(line, posix=True, punctuation_chars="|;&()")
    words.whitespace_split = True
    return list(words)


def inline_commands(page: str) -> list[list[str]]:
    """What stands in the text as code that begins with `kvrag`, as words."""
    text = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"(?<!`)`((?:[A-Z_]+=\S+ )?kvrag\s[^`]+)`", text)
    return [command_lines(command.replace("\n", " "))[0] for command in found]
