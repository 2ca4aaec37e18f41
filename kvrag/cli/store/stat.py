"""`kvrag store`: what lies in the store and the catalog, and keeping it in order.

`advise` opens a model, and so does `verify --repair` where a block has to be computed again.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer

from kvrag.cli.advise import advise
from kvrag.cli.common import JsonOption, format_bytes, plain_table, print_json, settings_of, show
from kvrag.cli.maintain import copy, gc, ls, verify

if TYPE_CHECKING:
    from kvrag.config import Settings

__all__ = ["app"]

app = typer.Typer(
    help="Look into the store, and keep it in order.", no_args_is_help=True, rich_markup_mode=None
)
app.command("advise")(advise)
app.command("ls")(ls)
app.command("verify")(verify)
app.command("gc")(gc)
app.command("copy")(copy)


@app.command()
def stat(context: typer.Context, as_json: JsonOption = False) -> None:
    """Blocks, bytes and limits of every tier, and the numbers of the catalog."""
    facts = store_facts(settings_of(context))
    if as_json:
        print_json(facts)
        return
    columns = ("tier", "blocks", "bytes", "limit", "policy", "damaged", "errors", "healthy")
    table = plain_table(*columns, title=f"Store of {facts['home']}")
    for tier in facts["tiers"]:
        limit = tier["limit_bytes"]
        table.add_row(
            tier["name"],
            str(tier["blocks"]),
            format_bytes(tier["nbytes"]),
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


def store_facts(settings: Settings) -> dict[str, Any]:
    """Tiers, quarantine and catalog counts of a home, without the engine.

    Counters of events start with the process, so here they tell of this look alone; `quarantined`
    is what the disk tier has put aside since ever (it keeps the newest few).

    Raises SettingsError for a home that does not exist: looking makes none.
    """
    from kvrag.errors import SettingsError
    from kvrag.retrieval.catalog import Catalog, Counts
    from kvrag.store.layout import Layout
    from kvrag.store.quarantine import Quarantine
    from kvrag.store.tiered import TieredStore
    from kvrag.tiers import tier_slots

    home = settings.home
    if not home.is_dir():
        raise SettingsError(f"home {home} does not exist; `kvrag precompute` makes it")
    with TieredStore(tier_slots(settings)) as store:
        tiers = [dataclasses.asdict(tier) for tier in store.stats().tiers]
    counts = Counts(0, 0, 0, 0)
    if (home / "catalog.sqlite").exists():
        with Catalog.open(home / "catalog.sqlite") as catalog:
            counts = catalog.counts(settings.namespace)
    return {
        "home": str(home),
        "namespace": settings.namespace,
        "tiers": tiers,
        "quarantined": len(Quarantine(Layout(home / "kv").quarantine).names()),
        "catalog": dataclasses.asdict(counts),
    }
