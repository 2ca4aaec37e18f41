"""`kvrag store ls`: the blocks of a namespace in one tier, one by one."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Literal

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

__all__ = ["ls"]


def ls(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="Most blocks that are shown.")] = 50,
    tier: Annotated[Literal["disk", "redis"], typer.Option(help="Where to look.")] = "disk",
    as_json: JsonOption = False,
) -> None:
    """The blocks of the namespace on disk, or in Redis, the most recently used first."""
    settings = settings_of(context)
    total, blocks = _blocks(settings, tier, limit)
    if as_json:
        facts = {"namespace": settings.namespace, "tier": tier, "total": total, "blocks": blocks}
        print_json(facts)
        return
    columns = ("digest", "kind", "tokens", "bytes", "codec", "corpus", "unused for")
    title = f"{len(blocks)} of {total} blocks of {settings.namespace} in {tier}"
    table = plain_table(*columns, title=title)
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


def _blocks(settings: Settings, name: str, limit: int) -> tuple[int, list[dict[str, Any]]]:
    """How many blocks the namespace has in that tier, and those used last."""
    from kvrag.home import existing_home
    from kvrag.store.errors import BlockFormatError
    from kvrag.store.keys import KeyMaker
    from kvrag.store.sealing import is_sealed
    from kvrag.store.secret import load_or_create_secret
    from kvrag.tiers import open_tier

    home = existing_home(settings)
    rows: list[dict[str, Any]] = []
    with closing(open_tier(settings, name)) as tier:
        if not home.secret.is_file():
            return 0, rows
        tag = KeyMaker(load_or_create_secret(home.secret)).tag(settings.namespace)
        referred = home.referred_keys() or set()
        held = [entry for entry in reversed(tier.entries()) if entry.key.tag == tag]
        shown = held[:limit]
        for entry, header in zip(shown, tier.headers([e.key for e in shown]), strict=True):
            row: dict[str, Any] = {"key": str(entry.key), "nbytes": entry.nbytes}
            row |= {"idle_s": round(entry.idle_s), "corpus": entry.key in referred}
            if isinstance(header, BlockFormatError):
                rows.append(row | {"kind": None, "tokens": None, "codec": str(header)})
            elif header is not None:
                tokens = None if is_sealed(header) else len(header.token_ids)
                rows.append(row | {"kind": header.kind, "tokens": tokens, "codec": header.codec})
        return len(held), rows
