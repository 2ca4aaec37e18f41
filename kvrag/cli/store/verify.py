"""`kvrag store verify`: read every block anew."""

from __future__ import annotations

from typing import Annotated

import typer

from kvrag.cli.common import JsonOption, format_bytes, print_json, settings_of, show, warn

__all__ = ["verify"]

_EXIT_FAILED, _EXIT_DAMAGED = 1, 4


def verify(
    context: typer.Context,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Put damaged blocks aside, and compute what the corpus lacks again.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read every block on disk, and in Redis if there is one, anew, of all namespaces.

    Exits with 4 if one stays damaged or missing, else with 1 if Redis could not be read.
    """
    from kvrag.cli.bar import shown
    from kvrag.upkeep.checking import check_blocks

    settings = settings_of(context)
    with shown() as report:
        checked = check_blocks(settings, repair=repair, report=report)
    damaged = [
        {"tier": row.tier, "key": str(row.key), "corpus": row.corpus, "damage": row.damage}
        for row in checked.damaged
    ]
    if as_json:
        facts = {"blocks": checked.blocks, "nbytes": checked.nbytes, "damaged": damaged}
        facts |= {"missing": list(map(str, checked.missing)), "repaired": checked.repaired}
        facts |= {"lacking": list(map(str, checked.lacking))}
        print_json(facts | {"unreachable": checked.unreachable})
    else:
        show(*(f"{row['key']} in {row['tier']}: {row['damage']}" for row in damaged))
        show(
            f"{checked.blocks - len(damaged)} of {checked.blocks} blocks are sound, "
            f"{format_bytes(checked.nbytes)}; {checked.repaired} repaired"
        )
        if checked.missing:
            show(f"{len(checked.missing)} that documents refer to were not on disk")
        if checked.lacking:
            lacking = len(checked.lacking)
            show(f"{lacking} belong to another model, codec or namespace: precompute there")
    for tier, reason in checked.unreachable.items():
        warn(f"tier {tier} was not read: {reason}")
    if len(damaged) + len(checked.missing) > checked.repaired:
        raise typer.Exit(_EXIT_DAMAGED)
    if checked.unreachable:
        raise typer.Exit(_EXIT_FAILED)
