"""`kvrag corpus drop`: delete a corpus."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import typer

from kvrag.cli.common import JsonOption, one_line, print_json, settings_of, show, warn
from kvrag.cli.corpus.arguments import NameArgument

__all__ = ["drop"]

_EXIT_DECLINED = 1


def drop(
    context: typer.Context,
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a corpus: documents, vectors, index, what was fixed for it, and its KV.

    KV that another corpus shares stays. Refused while a job works on it.
    """
    from kvrag.corpora.dropping import drop_corpus
    from kvrag.corpora.listing import describe
    from kvrag.errors import InputError

    settings = settings_of(context, namespace=name)
    facts, _ = describe(settings)
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("dropping a corpus asks first, and there is nobody to ask: give --yes")
        # Not typer's own question, which writes a space to stdout.
        kept = f"{facts.documents} documents and their KV of {one_line(name)}"
        sys.stderr.write(f"Delete {kept}? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            show("nothing was deleted")
            raise typer.Exit(_EXIT_DECLINED)
    dropped = drop_corpus(settings)
    if as_json:
        print_json({"corpus": name} | dataclasses.asdict(dropped))
    else:
        show(f"deleted {dropped.documents} documents, {dropped.chunks} chunks and the KV of {name}")
    if dropped.owed:
        warn(
            f"{dropped.owed} blocks lie in a tier that cannot delete them now; that is done when "
            "it is back and the home is in use"
        )
