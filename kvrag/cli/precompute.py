"""`kvrag precompute`: documents into the corpus, and the KV of every chunk into the store."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrag.cli.common import (
    JsonOption,
    check_output_file,
    format_bytes,
    format_seconds,
    one_line,
    print_json,
    settings_of,
)
from kvrag.cli.corpus.arguments import tell_waiting

if TYPE_CHECKING:
    from kvrag.config import Settings
    from kvrag.precompute.filing import Item
    from kvrag.precompute.progress import Progress
    from kvrag.precompute.shard import Shard
    from kvrag.retrieval.loaders import Skipped
    from kvrag.upkeep.standing import Standing

__all__ = ["precompute"]

_EXIT_SKIPPED = 3


def precompute(
    context: typer.Context,
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders, patterns and URLs; none: only the missing KV."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Name of the corpus; the setting 'namespace'.")
    ] = None,
    max_document_bytes: Annotated[
        int | None, typer.Option(help="Larger files are skipped.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of text that is not UTF-8; guessed where that is certain.")
    ] = None,
    codec: Annotated[str | None, typer.Option(help="How KV is encoded: raw, int8 or int4.")] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only the I-th of N parts of the documents.")
    ] = "1/1",
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete documents whose files are gone.")
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Cut and embed known documents as the settings now say."),
    ] = False,
    manifest: Annotated[
        Path | None, typer.Option(help="File for a list of what the corpus then holds.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Compute on Ray: local, auto or a cluster's host:port."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Ray's workers; as many as there is room for.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what it would take, and store nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add documents and compute their KV.

    Goes on where it was interrupted. Exits with 3 if something was skipped.
    """
    settings = settings_of(
        context, max_document_bytes=max_document_bytes, codec=codec, namespace=corpus
    )
    from kvrag.errors import InputError
    from kvrag.precompute.shard import Shard
    from kvrag.retrieval.loaders import read

    part = Shard.parse(shard)
    if not paths and (part.count > 1 or prune or rebuild or dry_run):
        raise InputError("--shard, --prune, --rebuild and --dry-run need files, folders or URLs")
    if workers is not None and ray is None:
        raise InputError("--workers needs --ray")
    if manifest is not None:
        check_output_file(manifest)
    # A path that does not exist is found here, before a model is opened.
    documents = (
        read(paths, max_bytes=settings.max_document_bytes, encoding=encoding) if paths else None
    )
    if documents is not None and dry_run:
        _plan(settings, documents, part, as_json=as_json)
        return
    from kvrag.cli.bar import shown
    from kvrag.engine import Engine
    from kvrag.home import Home
    from kvrag.precompute.lock import only_job
    from kvrag.precompute.ray_workers import RayWorkers

    on_ray = None if ray is None else RayWorkers(ray, workers)
    lock = Home(settings.home).job_lock(settings.namespace, str(part))
    with (
        Engine.open(settings) as engine,
        only_job(lock, tell_waiting(settings.namespace)),
        shown() as show_standing,
        # Ray prints there what happens to its processes.
        nullcontext() if on_ray is None else redirect_stdout(sys.stderr),
    ):

        def report(progress: Progress) -> None:
            show_standing(_standing(progress))

        if documents is None:
            progress = engine.complete(report, workers=on_ray)
        else:
            progress = engine.add(documents, report, shard=part, rebuild=rebuild, workers=on_ray)
            if prune and paths:
                progress.documents_vanished = engine.prune(paths)
        if manifest is not None:
            engine.write_manifest(manifest)
    seen = progress.documents_added + progress.documents_known + progress.documents_elsewhere
    if paths and not seen and not progress.skipped and not progress.documents_vanished:
        raise InputError(f"no documents in {', '.join(paths)}")
    if not paths and not progress.total_chunks:
        raise InputError("the corpus is empty; name files or folders to add")
    if as_json:
        print_json(_summary(progress))
    else:
        sys.stdout.write(_sentence(progress) + "\n")
    _end(progress.skipped)


def _end(skipped: Sequence[Skipped]) -> None:
    """List what was skipped, and exit with 3 if something was."""
    if skipped:
        for item in skipped:
            sys.stderr.write(f"skipped: {one_line(f'{item.source}: {item.reason}')}\n")
        sys.stderr.write(f"{len(skipped)} skipped, so the exit code is {_EXIT_SKIPPED}\n")
        raise typer.Exit(_EXIT_SKIPPED)


def _plan(settings: Settings, documents: Iterable[Item], shard: Shard, *, as_json: bool) -> None:
    """What the job would take. The home stays as it is; where there is none, none is made."""
    import tempfile

    from kvrag.engine import Engine

    with tempfile.TemporaryDirectory(prefix="kvrag-plan-") as folder:
        there = settings.home.is_dir()
        with Engine.open(settings if there else settings.apart(Path(folder))) as engine:
            plan = engine.plan(documents, shard)
    needed = plan.nbytes.get(settings.codec, 0)
    tiers = _tiers(settings, needed)
    if as_json:
        print_json(
            {
                "documents": plan.documents,
                "documents_known": plan.documents_known,
                "chunks": plan.chunks,
                "blocks": plan.blocks,
                "tokens": plan.tokens,
                "nbytes": plan.nbytes,
                "tokens_per_s": plan.tokens_per_s,
                "seconds": plan.seconds,
                "tiers": tiers,
                "skipped": [{"source": s.source, "reason": s.reason} for s in plan.skipped],
            }
        )
        _end(plan.skipped)
        return
    sys.stdout.write(
        f"{plan.documents} documents to add, {plan.documents_known} known; {plan.chunks} chunks in "
        f"{plan.blocks} blocks, {plan.tokens} tokens to compute\n"
    )
    if plan.seconds is not None:
        sys.stdout.write(
            f"about {format_seconds(plan.seconds)} at {plan.tokens_per_s:.0f} tokens/s\n"
        )
        sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.nbytes.items())
        sys.stdout.write(f"KV by codec: {sizes}\n")
    for tier in tiers:
        room = "no limit" if tier["room"] is None else f"room for {format_bytes(tier['room'])}"
        short = "" if tier["fits"] else ": NOT enough"
        sys.stdout.write(f"{tier['name']}: {format_bytes(needed)} needed, {room}{short}\n")
    _end(plan.skipped)


def _tiers(settings: Settings, needed: int) -> list[dict[str, Any]]:
    """For each tier that keeps a corpus the bytes that it may take; None: as many as come."""
    import shutil

    from kvrag.home import Home

    folder = settings.home
    while not folder.is_dir():
        folder = folder.parent
    rooms = {"disk": shutil.disk_usage(folder).free}
    if settings.disk_bytes is not None:
        kept = sum(path.stat().st_size for path in Home(settings.home).kv.rglob("*.kv"))
        rooms["disk"] = min(rooms["disk"], max(0, settings.disk_bytes - kept))
    found: dict[str, int | None] = dict(rooms)
    if settings.redis_url is not None:
        found["redis"] = settings.redis_bytes
    return [
        {"name": name, "nbytes": needed, "room": room, "fits": room is None or needed <= room}
        for name, room in found.items()
    ]


def _summary(progress: Progress) -> dict[str, Any]:
    return {
        "documents_added": progress.documents_added,
        "documents_known": progress.documents_known,
        "documents_elsewhere": progress.documents_elsewhere,
        "documents_replaced": progress.documents_replaced,
        "documents_vanished": progress.documents_vanished,
        "chunks": progress.total_chunks or 0,
        "chunks_stored_before": progress.chunks_stored_before,
        "tokens_computed": progress.tokens_computed,
        "bytes_written": progress.bytes_written,
        "tokens_per_s": progress.tokens_per_s,
        "seconds": progress.seconds,
        "busy": progress.busy,
        "skipped": [{"source": s.source, "reason": s.reason} for s in progress.skipped],
    }


def _sentence(progress: Progress) -> str:
    chunks = progress.total_chunks or 0
    gone = [
        f"{count} {how}"
        for count, how in (
            (progress.documents_replaced, "replaced"),
            (progress.documents_vanished, "vanished"),
            (progress.documents_elsewhere, "left to other shards"),
        )
        if count
    ]
    if gone:
        return f"{_work(progress)}; {', '.join(gone)}"
    if not chunks:
        return "nothing was added"
    if not progress.documents_added and not progress.tokens_computed:
        return f"nothing to do: the KV of all {chunks} chunks is stored"
    return _work(progress)


def _work(progress: Progress) -> str:
    chunks, before = progress.total_chunks or 0, progress.chunks_stored_before
    return (
        f"{progress.documents_added} documents added, {progress.documents_known} known before; "
        f"{chunks} chunks, {before} stored before; "
        f"{progress.tokens_computed} tokens computed at {progress.tokens_per_s:.0f} tokens/s, "
        f"{format_bytes(progress.bytes_written)} written in {format_seconds(progress.seconds)}"
    )


def _standing(progress: Progress) -> Standing:
    """Where the job is among the chunks, and among the documents until all of them are there."""
    from kvrag.upkeep.standing import Standing

    documents = progress.documents_added + progress.documents_known
    words = (
        []
        if progress.total_chunks is not None
        else [f"{documents} documents so far, {len(progress.skipped)} skipped"]
    )
    words += [
        f"{progress.tokens_per_s:.0f} tokens/s",
        format_bytes(progress.bytes_written),
    ]
    if (left_s := progress.remaining_s) is not None:
        words.append(f"{format_seconds(left_s)} left")
    return Standing("chunks", progress.chunks_done, progress.total_chunks, ", ".join(words))
