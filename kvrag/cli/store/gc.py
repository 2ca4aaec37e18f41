"""`kvrag store gc`: delete what nobody needs."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from kvrag.cli.common import JsonOption, format_bytes, info, print_json, settings_of, show, warn

__all__ = ["gc"]

_EXIT_FAILED = 1


def gc(
    context: typer.Context,
    unused_days: Annotated[
        float, typer.Option(min=0, help="Keep orphans used in that many days; default none.")
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete blocks that no corpus refers to, what crashes left half written, and the quarantine.

    On disk and in Redis, of all namespaces. Blocks of passages that requests brought are such, too:
    they are computed again when they come again. Exits with 1 if Redis could not be looked at.
    """
    from kvrag.upkeep.collecting import collect

    found = collect(
        settings_of(context),
        unused_s=unused_days * 86_400,
        dry_run=dry_run,
        waiting=lambda holder: info(f"an import ({holder}) is under way; waiting for it"),
    )
    if as_json:
        print_json(dataclasses.asdict(found) | {"deleted": not dry_run})
    else:
        show(
            f"{'would delete' if dry_run else 'deleted'} {found.orphans} blocks that no corpus "
            f"refers to, {found.leftovers} half-written files and {found.quarantined} of the "
            f"quarantine: {format_bytes(found.nbytes)}"
        )
    for tier, reason in found.unreachable.items():
        warn(f"tier {tier} was not looked at, or not to the end: {reason}")
    if found.unreachable:
        raise typer.Exit(_EXIT_FAILED)
