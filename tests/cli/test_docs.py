"""The pages name every setting, command and option that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from kvrag.cli.main import app
from kvrag.config import Settings

ROOT = Path(__file__).parents[2]


def setting_rows() -> dict[str, str]:
    page = (ROOT / "docs" / "settings.md").read_text()
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, flags=re.MULTILINE))


def test_every_setting_is_documented_and_no_other():
    assert list(setting_rows()) == list(Settings.model_fields)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_defaults_are_documented(name):
    documented = setting_rows()[name]
    value = getattr(Settings(), name)
    expected = "none" if value is None else f"`{value}`".replace(str(Path.home()), "~")
    assert documented == expected


def commands(command, path=()):
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def test_every_command_and_option_is_documented():
    page = (ROOT / "docs" / "cli.md").read_text()
    for path, command in commands(typer.main.get_command(app)):
        assert " ".join(("kvrag", *path)) in page
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and "completion" not in option:
                    assert f"`{option}`" in page, (path, option)


def test_links_and_files_that_the_pages_name_exist():
    for page in ("docs/cli.md", "docs/settings.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), (page, link)
        for name in re.findall(r"`((?:kvrag|store|tests|retrieval|kernels)/[\w./]+)`", text):
            assert (ROOT / name).exists(), (page, name)
