"""`kvrag corpus ls`: the corpora of the home."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from kvrag.corpora.listing import CorpusFacts

__all__ = ["ls", "made_with"]


def ls(context: typer.Context, as_json: JsonOption = False) -> None:
    """The corpora of the home, with what they were made with."""
    from kvrag.corpora.listing import list_corpora

    settings = settings_of(context)
    found = list_corpora(settings)
    if as_json:
        rows = [dataclasses.asdict(facts) for facts in found]
        print_json({"home": str(settings.home), "corpora": rows})
        return
    columns = ("name", "documents", "chunks", "blocks", "bytes", "missing", "made with")
    table = plain_table(*columns, title=f"{len(found)} corpora of {settings.home}")
    for facts in found:
        numbers = (facts.documents, facts.chunks, facts.blocks)
        table.add_row(
            one_line(facts.name),
            *map(str, numbers),
            format_bytes(facts.nbytes),
            str(facts.missing),
            made_with(facts),
        )
    show_lines(table)


def made_with(facts: CorpusFacts) -> str:
    """Codecs, dtypes and the size of chunks, in a few words."""
    words = dict.fromkeys(
        f"{kind.codec or 'unknown'}" + (f" of {kind.dtype}" if kind.dtype else "")
        for kind in facts.kinds
    )
    tokens = facts.made_with.get("chunk_tokens")
    return ", ".join([*words, *([f"chunks of {tokens} tokens"] if tokens else [])])
