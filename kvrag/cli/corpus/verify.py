"""`kvrag corpus verify`: hold a corpus's parts against one another."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from kvrag.cli.common import JsonOption, format_bytes, print_json, settings_of, show
from kvrag.cli.corpus.arguments import NameArgument, tell_waiting

__all__ = ["verify"]

_EXIT_WRONG = 4
_SHOWN = 20


def verify(
    context: typer.Context,
    name: NameArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Make anew what can be.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check each chunk's token ids, vector, words, references and blocks.

    With the model, codec and embedder of the settings. Exits with 4 if something stays wrong.
    """
    from kvrag.cli.bar import shown
    from kvrag.corpora.checking import check_corpus

    settings = settings_of(context, namespace=name)
    with shown() as report:
        checked = check_corpus(settings, repair=repair, waiting=tell_waiting(name), report=report)
    if as_json:
        print_json({"corpus": name} | dataclasses.asdict(checked))
    else:
        for problem in checked.problems[:_SHOWN]:
            chunk = "" if problem.chunk is None else f"chunk {problem.chunk}, "
            block = "" if problem.block is None else f"block {problem.block}, "
            show(f"{chunk}{block}{problem.part}: {problem.what}")
        if len(checked.problems) > _SHOWN:
            show(f"and {len(checked.problems) - _SHOWN} more (--json lists all)")
        if not checked.index_current:
            show("the index file is behind or damaged; the next search makes it anew")
        show(
            f"{checked.chunks} chunks, {checked.blocks} blocks, {format_bytes(checked.nbytes)}: "
            f"{len(checked.problems)} problems, "
            f"{len(checked.problems) - len(checked.left)} mended, {len(checked.left)} left"
        )
    if checked.left:
        raise typer.Exit(_EXIT_WRONG)
