"""Showing where a long command is: a bar on a terminal, else a line now and then. On stderr."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvrag.upkeep.standing import Report, Standing

__all__ = ["shown"]

#: Without a terminal, a line this often.
_LINE_EVERY_S = 10.0


@contextmanager
def shown() -> Iterator[Report]:
    """What a job calls, as often as it likes, to show where it is."""
    if not sys.stderr.isatty():
        yield _line_writer()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    console = Console(stderr=True)
    # Four times a second: the job needs the processor more than the bar does.
    with Progress(*columns, console=console, refresh_per_second=4, transient=True) as bar:
        task = bar.add_task("", total=None, words="")

        def report(at: Standing) -> None:
            bar.update(task, description=at.what, total=at.total, completed=at.done, words=at.words)

        yield report


def _line_writer() -> Report:
    next_s = time.monotonic() + _LINE_EVERY_S

    def report(at: Standing) -> None:
        nonlocal next_s
        if time.monotonic() < next_s:
            return
        next_s = time.monotonic() + _LINE_EVERY_S
        count = str(at.done) if at.total is None else f"{at.done} of {at.total}"
        words = f", {at.words}" if at.words else ""
        sys.stderr.write(f"{count} {at.what}{words}\n")

    return report
