"""`kvrag documents`: list and delete the documents of the corpus. Opens no model."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Annotated

import typer

from kvrag.cli.common import JsonOption, one_line, plain_table, print_json, settings_of, show, warn

__all__ = ["app"]

_EXIT_FAILED = 1

app = typer.Typer(
    help="List and delete the documents of the corpus.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def ls(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="Most documents that are shown.")] = 100,
    offset: Annotated[int, typer.Option(min=0, help="Documents that are passed over.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """The documents of the namespace in the order in which they were added."""
    from kvrag.upkeep.documents import list_documents

    settings = settings_of(context)
    total, found = list_documents(settings, limit=limit, offset=offset)
    if as_json:
        rows = [dataclasses.asdict(document) for document in found]
        for row in rows:
            del row["namespace"]  # that of all, said once
        print_json({"namespace": settings.namespace, "total": total, "documents": rows})
        return
    title = f"{len(found)} of {total} documents of {settings.namespace}"
    table = plain_table("id", "title", "source", "chunks", "added", title=title)
    # Whole in any terminal: it is what `rm` takes.
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max((len(document.id) for document in found), default=0)
    for document in found:
        added = datetime.fromtimestamp(document.added_at).astimezone()
        table.add_row(
            document.id,
            one_line(document.title),
            one_line(document.source),
            str(document.num_chunks),
            f"{added:%Y-%m-%d %H:%M}",
        )
    show(table)


@app.command()
def rm(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID…", help="As `ls` shows them.")],
    as_json: JsonOption = False,
) -> None:
    """Delete documents of the namespace, with their vectors and the KV that no other one shares.

    Exits with 1 if there is no document of some id; the others are deleted.
    """
    from kvrag.upkeep.documents import remove_documents

    settings = settings_of(context)
    removed = remove_documents(settings, ids)
    if as_json:
        print_json({"namespace": settings.namespace} | dataclasses.asdict(removed))
    else:
        show(f"deleted {len(removed.deleted)} documents of {settings.namespace}")
    for name in removed.unknown:
        warn(f"there is no document {name} in {settings.namespace}")
    if removed.owed:
        warn(
            f"{removed.owed} blocks lie in a tier that cannot delete them now; that is done when "
            "it is back and the home is in use"
        )
    if removed.unknown:
        raise typer.Exit(_EXIT_FAILED)
