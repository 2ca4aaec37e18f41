"""What the commands on one corpus share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from kvrag.cli.common import info

__all__ = ["NameArgument", "tell_waiting"]

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="As `ls` shows it.")]


def tell_waiting(corpus: str) -> Callable[[str], None]:
    """Says on stderr for whom a command waits."""

    def tell(holder: str) -> None:
        info(f"another job ({holder}) works on the corpus {corpus!r}; waiting for it")

    return tell
