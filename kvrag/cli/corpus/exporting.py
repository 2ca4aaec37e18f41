"""`kvrag corpus export`: a corpus into one file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from kvrag.cli.common import (
    JsonOption,
    check_output_file,
    format_bytes,
    print_json,
    settings_of,
    show,
    warn,
)
from kvrag.cli.corpus.arguments import NameArgument, tell_waiting

__all__ = ["export"]

_EXIT_LEFT_OUT = 3


def export(
    context: typer.Context,
    name: NameArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written whole, or not at all.")],
    as_json: JsonOption = False,
) -> None:
    """Write documents, chunks, vectors and the KV of the settings' model and codec to one file.

    Exits with 3 if blocks were missing, which `kvrag precompute` computes here or there.
    """
    from kvrag.cli.bar import shown
    from kvrag.corpora.exporting import export_corpus

    settings = settings_of(context, namespace=name)
    check_output_file(file)
    with shown() as report:
        exported = export_corpus(settings, file, waiting=tell_waiting(name), report=report)
    if as_json:
        print_json({"corpus": name, "file": str(file)} | dataclasses.asdict(exported))
    else:
        show(
            f"{exported.documents} documents, {exported.chunks} chunks and {exported.blocks} "
            f"blocks of {name} in {file}: {format_bytes(exported.nbytes)}"
        )
        if exported.left_out:
            show(f"{exported.left_out} blocks of other models and codecs are not in it")
    if exported.was_encrypted:
        warn(f"{file} is not encrypted, and the home is")
    if exported.missing:
        warn(f"{len(exported.missing)} blocks are missing or damaged, and not in it")
        raise typer.Exit(_EXIT_LEFT_OUT)
