"""`kvrag corpus import`: a corpus out of the file of an exported one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from kvrag.cli.common import JsonOption, print_json, settings_of, show
from kvrag.cli.corpus.arguments import tell_waiting

__all__ = ["import_"]


def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="As `export` wrote it.")],
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Instead of the name in the file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a corpus of an exported one. It appears whole, when every byte is verified and stored.

    Only for the model and dtype that it was computed with.
    """
    from kvrag.cli.bar import shown
    from kvrag.corpora.importing import import_corpus

    settings = settings_of(context)
    if name is not None:
        settings_of(context, namespace=name)  # whether it can be one
    with shown() as report:
        imported = import_corpus(
            settings, file, name, waiting=tell_waiting(name or file.name), report=report
        )
    if as_json:
        print_json(dataclasses.asdict(imported))
        return
    show(
        f"{imported.documents} documents, {imported.chunks} chunks and {imported.blocks} blocks "
        f"are the corpus {imported.name} now"
    )
    if imported.codec != settings.codec:
        show(f"its codec is {imported.codec}: use it with --set codec={imported.codec}")
