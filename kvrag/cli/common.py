"""What the commands share: the options that all take, and how things are shown.

Nothing heavy is imported here: `kvrag --help` reads this module.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from kvrag.config import Settings

__all__ = [
    "Globals",
    "JsonOption",
    "check_output_file",
    "format_bytes",
    "format_seconds",
    "globals_of",
    "info",
    "one_line",
    "parse_setting",
    "plain_table",
    "print_json",
    "read_input_file",
    "settings_of",
    "show",
    "warn",
]

#: A table that goes into a file or a pipe need not fit a screen.
_WIDTH_WITHOUT_TERMINAL = 160

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]


@dataclass(slots=True)
class Globals:
    """The options that all take. `overrides` are settings, stronger than any other source."""

    overrides: dict[str, Any] = field(default_factory=dict)
    verbose: bool = False


def globals_of(context: typer.Context) -> Globals:
    """The options that all commands take."""
    return context.obj if isinstance(context.obj, Globals) else Globals()


def settings_of(context: typer.Context, **overrides: Any) -> Settings:
    """The settings in force: a command's own, the options that all take, then the other sources.

    An override of None is none. Raises SettingsError.
    """
    from kvrag.config import Settings
    from kvrag.errors import SettingsError

    given = {name: value for name, value in overrides.items() if value is not None}
    values = globals_of(context).overrides | given
    for name in values:
        # Not left to Settings, for which names such as `_env_file` are switches of its own.
        if name not in Settings.model_fields:
            known = ", ".join(Settings.model_fields)
            raise SettingsError(f"unknown setting {name!r}; known are {known}")
    return Settings(**values)


def parse_setting(text: str) -> tuple[str, Any]:
    """Name and value of `name=value`. What is no TOML value is the text that it is.

    Raises typer.BadParameter.
    """
    from kvrag.config import value_from_text

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint="--set")
    return name.strip(), value_from_text(value)


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def one_line(text: str) -> str:
    """`text` on one line, without the control characters that would steer a terminal."""
    joined = " ".join(text.split())
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in joined)


def info(sentence: str) -> None:
    """One line of stderr for what a command does and nobody asked."""
    sys.stderr.write(f"info: {one_line(sentence)}\n")


def warn(sentence: str) -> None:
    """One line of stderr for what did not end the command."""
    sys.stderr.write(f"warning: {one_line(sentence)}\n")


def plain_table(*columns: str, title: str | None = None) -> Table:
    """A table without a frame, so that what stands in it can be cut and pasted."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)


def show(*tables: Table | str) -> None:
    """Print tables and lines to stdout; no text in them is taken for markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL
    console = Console(width=width, markup=False, highlight=False, emoji=False)
    for table in tables:
        console.print(table, soft_wrap=isinstance(table, str))


def format_bytes(nbytes: float) -> str:
    """A number of bytes for people: decimal units, three digits or so."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def format_seconds(seconds: float) -> str:
    """A duration for people."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def check_output_file(path: Path) -> None:
    """Raise InputError where no file can be at `path`: found before hours of work, not after."""
    from kvrag.errors import InputError

    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")


def read_input_file(path: Path) -> bytes:
    """The bytes of a file named on the command line.

    Raises InputError with the path.
    """
    from kvrag.errors import InputError

    try:
        return path.read_bytes()
    except OSError as exc:
        raise InputError(f"{path} cannot be read: {exc.strerror or exc}") from exc
