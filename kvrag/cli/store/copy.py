"""`kvrag store ls`, `verify`, `gc` and `copy`: the blocks of a home, one by one."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrag.cli.common import (
    JsonOption,
    format_bytes,
    format_seconds,
    plain_table,
    print_json,
    settings_of,
    show,
)

if TYPE_CHECKING:
    from kvrag.config import Settings
    from kvrag.store.keys import BlockKey

__all__ = ["copy", "gc", "ls", "verify"]

_EXIT_DAMAGED = 4
_CATALOG, _SECRET = "catalog.sqlite", "key.secret"
#: Without these, or with others, the blocks of a home are not found or cannot be read.
_OF_ITS_BLOCKS = {_SECRET: "a key secret", "encryption.id": "an encryption key"}


def ls(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="Most blocks that are shown.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """The blocks of the namespace on disk, the most recently used first."""
    from kvrag.store.disk import DiskTier
    from kvrag.store.errors import BlockFormatError
    from kvrag.store.keys import KeyMaker
    from kvrag.store.secret import load_or_create_secret

    settings = settings_of(context)
    home = _home(settings)
    blocks: list[dict[str, Any]] = []
    total = 0
    if (home / _SECRET).is_file():
        tag = KeyMaker(load_or_create_secret(home / _SECRET)).tag(settings.namespace)
        referred = _referred(home) or set()
        with DiskTier(home / "kv") as tier:
            held = [entry for entry in reversed(tier.entries()) if entry.key.tag == tag]
            total = len(held)
            for entry in held[:limit]:
                row: dict[str, Any] = {"key": str(entry.key), "nbytes": entry.nbytes}
                row |= {"idle_s": round(entry.idle_s), "corpus": entry.key in referred}
                try:
                    header = tier.header(entry.key)
                except BlockFormatError as exc:
                    blocks.append(row | {"kind": None, "tokens": None, "codec": str(exc)})
                    continue
                if header is not None:
                    tokens = len(header.token_ids)
                    blocks.append(
                        row | {"kind": header.kind, "tokens": tokens, "codec": header.codec}
                    )
    if as_json:
        print_json({"namespace": settings.namespace, "total": total, "blocks": blocks})
        return
    columns = ("digest", "kind", "tokens", "bytes", "codec", "corpus", "unused for")
    table = plain_table(*columns, title=f"{len(blocks)} of {total} blocks of {settings.namespace}")
    for row in blocks:
        table.add_row(
            row["key"].split("/")[1][:16],
            row["kind"] or "damaged",
            "" if row["tokens"] is None else str(row["tokens"]),
            format_bytes(row["nbytes"]),
            row["codec"],
            "yes" if row["corpus"] else "no",
            format_seconds(row["idle_s"]),
        )
    show(table)


def verify(
    context: typer.Context,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Put damaged blocks aside, and compute those of the corpus again."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every block on disk anew, of all namespaces. Exits with 4 if one stays damaged."""
    from kvrag.store.disk import DiskTier
    from kvrag.store.maintenance import verify_blocks

    settings = settings_of(context)
    home = _home(settings)
    blocks = nbytes = 0
    damaged: list[dict[str, Any]] = []
    with DiskTier(home / "kv") as tier:
        referred = _referred(home) or set()
        for found in verify_blocks(tier, tier.keys(), repair=repair):
            blocks += 1
            nbytes += found.nbytes
            if found.damage is not None:
                corpus = found.key in referred
                damaged.append({"key": str(found.key), "corpus": corpus, "damage": found.damage})
    missing = [row["key"] for row in damaged if row["corpus"]] if repair else []
    lacking = _lacking(settings, missing) if missing else []
    repaired = len(damaged) - len(lacking) if repair else 0
    if as_json:
        facts = {"blocks": blocks, "nbytes": nbytes, "damaged": damaged, "repaired": repaired}
        print_json(facts | {"lacking": lacking})
    else:
        show(*(f"{row['key']}: {row['damage']}" for row in damaged))
        sound = blocks - len(damaged)
        show(f"{sound} of {blocks} blocks are sound, {format_bytes(nbytes)}; {repaired} repaired")
        if lacking:
            show(f"{len(lacking)} belong to another model, codec or namespace: precompute there")
    if len(damaged) > repaired:
        raise typer.Exit(_EXIT_DAMAGED)


def gc(
    context: typer.Context,
    unused_days: Annotated[
        float, typer.Option(min=0, help="Keep orphans used in that many days; default none.")
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete blocks that no corpus refers to, what crashes left half written, and the quarantine.

    Of all namespaces. Blocks of passages that requests brought are such, too: they are computed
    again when they come again.
    """
    from kvrag.errors import SettingsError
    from kvrag.store.disk import DiskTier
    from kvrag.store.layout import Layout, remove_if_abandoned
    from kvrag.store.quarantine import Quarantine

    home = _home(settings_of(context))
    layout = Layout(home / "kv")
    strange = [entry for key, entry in layout.walk() if key is None]
    if dry_run:
        leftovers = sum(entry.name.endswith(".tmp") for entry in strange)
    else:
        leftovers = sum(remove_if_abandoned(entry) for entry in strange)
    with DiskTier(home / "kv") as tier:
        # Listed before the catalog is read: a job refers to a block before it writes it.
        held = [entry for entry in tier.entries() if entry.idle_s >= unused_days * 86_400]
        referred = _referred(home)
        if referred is None:
            raise SettingsError(
                f"home {home} has no catalog, so nobody knows what its corpus refers to; if there "
                f"is none, delete {home / 'kv'}"
            )
        orphans = [entry for entry in held if entry.key not in referred]
        for entry in orphans:
            if not dry_run:
                tier.delete(entry.key)
    quarantine = Quarantine(layout.quarantine)
    aside = quarantine.entries()
    facts = {
        "orphans": len(orphans),
        "leftovers": leftovers,
        "quarantined": len(aside),
        "nbytes": sum(entry.nbytes for entry in orphans) + sum(aside.values()),
        "deleted": not dry_run,
    }
    if not dry_run:
        quarantine.clear()
    if as_json:
        print_json(facts)
        return
    show(
        f"{'would delete' if dry_run else 'deleted'} {len(orphans)} blocks that no corpus refers "
        f"to, {leftovers} half-written files and {len(aside)} of the quarantine: "
        f"{format_bytes(facts['nbytes'])}"
    )


def copy(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="Home, or folder of a disk tier.")],
    target: Annotated[Path, typer.Argument(metavar="TO", help="The same; made when absent.")],
    as_json: JsonOption = False,
) -> None:
    """Copy all blocks, byte by byte, leaving out those that are there. Run it again to go on.

    Between two homes the key secret is copied, too, and must not be another: without it no block
    is found. The catalog is not. Exits with 4 if a block of FROM is damaged.
    """
    from kvrag.errors import InputError, SettingsError
    from kvrag.store.disk import DiskTier
    from kvrag.store.files import create_once
    from kvrag.store.maintenance import copy_blocks

    source, target = source.expanduser().absolute(), target.expanduser().absolute()
    if not source.is_dir():
        raise InputError(f"{source} is no folder")
    if target == source:
        raise InputError(f"{source} cannot be copied to itself")
    from_folder, of_home = (source / "kv", True) if (source / _SECRET).exists() else (source, False)
    if not (from_folder / "blocks").is_dir():
        raise InputError(f"{source} is neither a home nor the folder of a disk tier")
    into = target / "kv" if of_home else target
    if of_home:
        for name, what in _OF_ITS_BLOCKS.items():
            there, here = target / name, source / name
            if there.exists() and _bytes_of(there) != _bytes_of(here):
                raise SettingsError(
                    f"{target} has {what} of its own: blocks of {source} would not be found there"
                )
    outcomes: Counter[str] = Counter()
    nbytes = 0
    with DiskTier(from_folder, "source") as one, DiskTier(into, "target") as other:
        if of_home:
            for name in _OF_ITS_BLOCKS:
                if (source / name).exists():
                    create_once(target / name, (source / name).read_bytes())
        for copied in copy_blocks(one, other):
            outcomes[copied.outcome] += 1
            nbytes += copied.nbytes if copied.outcome == "copied" else 0
            if copied.damage is not None:
                sys.stderr.write(f"warning: {copied.key} is left out: {copied.damage}\n")
    names = ("copied", "present", "damaged")
    if as_json:
        print_json({name: outcomes[name] for name in names} | {"nbytes": nbytes})
    else:
        show(
            f"{outcomes['copied']} blocks copied, {format_bytes(nbytes)}; {outcomes['present']} "
            f"were there, {outcomes['damaged']} are damaged"
        )
    if outcomes["damaged"]:
        raise typer.Exit(_EXIT_DAMAGED)


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _home(settings: Settings) -> Path:
    from kvrag.errors import SettingsError

    if not settings.home.is_dir():
        raise SettingsError(f"home {settings.home} does not exist; `kvrag precompute` makes it")
    return settings.home


def _referred(home: Path) -> set[BlockKey] | None:
    """Blocks that a corpus of the home refers to; None without a catalog."""
    from kvrag.retrieval.catalog import Catalog
    from kvrag.store.keys import BlockKey

    if not (home / _CATALOG).is_file():
        return None
    with Catalog.open(home / _CATALOG) as catalog:
        return {BlockKey.parse(key) for key in catalog.block_keys()}


def _lacking(settings: Settings, missing: list[str]) -> list[str]:
    """Compute what the corpus lacks; the keys that this model and namespace do not give."""
    from kvrag.engine import Engine
    from kvrag.store.keys import BlockKey

    with Engine.open(settings) as engine:
        engine.complete()
        return [key for key in missing if not engine.store.holds_durably(BlockKey.parse(key))]
