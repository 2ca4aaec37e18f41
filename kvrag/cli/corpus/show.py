"""`kvrag corpus show`: one corpus in detail."""

from __future__ import annotations

import dataclasses
from collections import Counter
from textwrap import shorten
from typing import Annotated

import typer

from kvrag.cli.common import (
    JsonOption,
    format_bytes,
    one_line,
    plain_table,
    print_json,
    settings_of,
)
from kvrag.cli.common import show as show_lines
from kvrag.cli.corpus.arguments import NameArgument

__all__ = ["show"]

_SHOWN_ORIGINS = 10
_SHOWN_GROUPS = 50
_SHOWN_CHARACTERS = 100


def show(
    context: typer.Context,
    name: NameArgument,
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="Compare all chunks with one another.")
    ] = False,
    threshold: Annotated[
        float, typer.Option(min=0.01, max=1, help="From what similarity on they are listed.")
    ] = 0.8,
    as_json: JsonOption = False,
) -> None:
    """What a corpus holds, where it came from, and what it was made with."""
    from kvrag.corpora.listing import describe
    from kvrag.corpora.nearly import nearly_the_same

    settings = settings_of(context, namespace=name)
    facts, origins = describe(settings)
    groups = nearly_the_same(settings, threshold) if near_duplicates else []
    if as_json:
        more = {"near_duplicates": [list(map(dataclasses.asdict, group)) for group in groups]}
        shown = dataclasses.asdict(facts) | {"origins": origins}
        print_json(shown | more if near_duplicates else shown)
        return
    table = plain_table("", "")
    table.show_header = False
    for what, number in (
        ("documents", facts.documents),
        ("chunks", facts.chunks),
        ("blocks", facts.blocks),
        ("not on disk", facts.missing),
    ):
        table.add_row(what, str(number))
    table.add_row("bytes on disk", format_bytes(facts.nbytes))
    for what, value in facts.made_with.items():
        table.add_row(what, shorten(one_line(value), _SHOWN_CHARACTERS, placeholder="…"))
    kinds: Counter[str] = Counter()
    for kind in facts.kinds:  # one for each prefix, which would be rows that look the same
        of = f" of model {kind.model[:16]}, {kind.dtype}" if kind.model else ""
        kinds[f"{kind.codec or 'unknown'}{of}"] += kind.blocks
    for what, blocks in kinds.items():
        table.add_row("blocks by kind", f"{blocks} {what}")
    for origin in origins[:_SHOWN_ORIGINS]:
        table.add_row("from", one_line(origin))
    if len(origins) > _SHOWN_ORIGINS:
        table.add_row("", f"and {len(origins) - _SHOWN_ORIGINS} other files")
    show_lines(f"corpus {one_line(name)}", table)
    if near_duplicates:
        show_lines(f"{len(groups)} groups of chunks that are nearly the same")
    for group in groups[:_SHOWN_GROUPS]:
        show_lines("; ".join(f"chunk {one.chunk} of {one_line(one.title)}" for one in group))
