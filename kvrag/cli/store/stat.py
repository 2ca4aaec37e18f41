"""`kvrag store stat`: blocks, bytes and limits of every tier, and the numbers of the catalog."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer

from kvrag.cli.common import (
    JsonOption,
    format_bytes,
    plain_table,
    print_json,
    settings_of,
    show,
    warn,
)

if TYPE_CHECKING:
    from kvrag.config import Settings

__all__ = ["stat"]

_EXIT_FAILED = 1


def stat(context: typer.Context, as_json: JsonOption = False) -> None:
    """Blocks, bytes and limits of every tier, and the numbers of the catalog.

    Exits with 1 if a tier could not be looked at.
    """
    facts = _facts(settings_of(context))
    if as_json:
        print_json(facts)
    else:
        _show(facts)
    unknown = [tier["name"] for tier in facts["tiers"] if tier["listed_s"] is None]
    for name in unknown:
        warn(f"tier {name} was not looked at, or not to the end")
    if unknown:
        raise typer.Exit(_EXIT_FAILED)


def _show(facts: dict[str, Any]) -> None:
    columns = ("tier", "blocks", "bytes", "limit", "policy", "damaged", "errors", "healthy")
    table = plain_table(*columns, title=f"Store of {facts['home']}")
    for tier in facts["tiers"]:
        limit, known = tier["limit_bytes"], tier["listed_s"] is not None
        table.add_row(
            tier["name"],
            str(tier["blocks"]) if known else "unknown",
            format_bytes(tier["nbytes"]) if known else "unknown",
            "none" if limit is None else format_bytes(limit),
            tier["policy"],
            str(tier["damaged"]),
            str(tier["errors"]),
            "yes" if tier["healthy"] else "no",
        )
    catalog = facts["catalog"]
    show(
        table,
        f"namespace {facts['namespace']}: {catalog['documents']} documents, "
        f"{catalog['chunks']} chunks, {catalog['vectors']} vectors, "
        f"{catalog['blocks']} blocks referred to; {facts['quarantined']} damaged blocks put aside",
    )
    if facts["owed_deletions"]:
        show(f"{facts['owed_deletions']} blocks of deleted documents are still to be deleted")


def _facts(settings: Settings) -> dict[str, Any]:
    """Tiers, quarantine and catalog counts of a home, without the engine.

    Counters of events start with the process, so here they tell of this look alone; `quarantined`
    is what the disk tier has put aside since ever (it keeps the newest few).

    Raises SettingsError for a home that does not exist.
    """
    from kvrag.home import existing_home
    from kvrag.retrieval.catalog import Catalog, Counts
    from kvrag.store.layout import Layout
    from kvrag.store.quarantine import Quarantine
    from kvrag.store.tiered import TieredStore, at_once
    from kvrag.tiers import tier_slots

    home = existing_home(settings)
    with TieredStore(tier_slots(settings), aside=at_once) as store:
        tiers = [dataclasses.asdict(tier) for tier in store.stats().tiers]
    counts, owed = Counts(0, 0, 0, 0), 0
    if home.catalog.exists():
        with Catalog.open(home.catalog) as catalog:
            counts, owed = catalog.counts(settings.namespace), catalog.num_owed_deletions()
    return {
        "home": str(home.path),
        "namespace": settings.namespace,
        "tiers": tiers,
        "quarantined": len(Quarantine(Layout(home.kv).quarantine).names()),
        "catalog": dataclasses.asdict(counts),
        "owed_deletions": owed,
    }
