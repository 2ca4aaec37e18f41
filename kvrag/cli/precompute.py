"""`kvrag precompute`: documents into the corpus, and the KV of every chunk into the store."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrag.cli.common import (
    JsonOption,
    format_bytes,
    format_seconds,
    one_line,
    print_json,
    settings_of,
)

if TYPE_CHECKING:
    from kvrag.precompute.job import Progress
    from kvrag.upkeep.standing import Standing

__all__ = ["precompute"]

_EXIT_SKIPPED = 3


def precompute(
    context: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders, patterns and URLs; none: only the missing KV."),
    ] = None,
    max_document_bytes: Annotated[
        int | None, typer.Option(help="Larger files are skipped.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of text that is not UTF-8; guessed where that is certain.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="How KV is encoded: raw, int8 or int4.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Add documents and compute their KV.

    Goes on where it was interrupted. Exits with 3 if something was skipped.
    """
    settings = settings_of(context, max_document_bytes=max_document_bytes, codec=codec)
    from kvrag.errors import InputError
    from kvrag.retrieval.loaders import load

    # A path that does not exist is found here, before a model is opened.
    documents = (
        load(paths, max_bytes=settings.max_document_bytes, encoding=encoding) if paths else None
    )
    from kvrag.cli.bar import shown
    from kvrag.engine import Engine

    with Engine.open(settings) as engine, shown() as show_standing:

        def report(progress: Progress) -> None:
            show_standing(_standing(progress))

        progress = engine.complete(report) if documents is None else engine.add(documents, report)
    seen = progress.documents_added + progress.documents_known + len(progress.skipped)
    if paths and not seen:
        raise InputError(f"no documents in {', '.join(paths)}")
    if not paths and not progress.total_chunks:
        raise InputError("the corpus is empty; name files or folders to add")
    if as_json:
        print_json(_summary(progress))
    else:
        sys.stdout.write(_sentence(progress) + "\n")
    if progress.skipped:
        for skipped in progress.skipped:
            sys.stderr.write(f"skipped: {one_line(f'{skipped.source}: {skipped.reason}')}\n")
        sys.stderr.write(f"{len(progress.skipped)} skipped, so the exit code is {_EXIT_SKIPPED}\n")
        raise typer.Exit(_EXIT_SKIPPED)


def _summary(progress: Progress) -> dict[str, Any]:
    return {
        "documents_added": progress.documents_added,
        "documents_known": progress.documents_known,
        "chunks": progress.total_chunks or 0,
        "chunks_stored_before": progress.chunks_stored_before,
        "tokens_computed": progress.tokens_computed,
        "bytes_written": progress.bytes_written,
        "tokens_per_s": progress.tokens_per_s,
        "seconds": progress.seconds,
        "skipped": [{"source": s.source, "reason": s.reason} for s in progress.skipped],
    }


def _sentence(progress: Progress) -> str:
    chunks, before = progress.total_chunks or 0, progress.chunks_stored_before
    if not chunks:
        return "nothing was added"
    if not progress.documents_added and not progress.tokens_computed:
        return f"nothing to do: the KV of all {chunks} chunks is stored"
    return (
        f"{progress.documents_added} documents added, {progress.documents_known} known before; "
        f"{chunks} chunks, {before} stored before; "
        f"{progress.tokens_computed} tokens computed at {progress.tokens_per_s:.0f} tokens/s, "
        f"{format_bytes(progress.bytes_written)} written in {format_seconds(progress.seconds)}"
    )


def _standing(progress: Progress) -> Standing:
    """Where the job is: among the documents, and then among their chunks."""
    from kvrag.upkeep.standing import Standing

    if progress.total_chunks is None:
        documents = progress.documents_added + progress.documents_known
        return Standing("documents", documents, words=f"{len(progress.skipped)} skipped")
    words = [
        f"{progress.tokens_per_s:.0f} tokens/s",
        format_bytes(progress.bytes_written),
    ]
    if (left_s := progress.remaining_s) is not None:
        words.append(f"{format_seconds(left_s)} left")
    return Standing("chunks", progress.chunks_done, progress.total_chunks, ", ".join(words))
