"""Deleting blocks that no corpus refers to, what crashes left half written, and the quarantine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from kvrag.config import Settings
from kvrag.home import existing_home
from kvrag.precompute.lock import Waiting, only_job
from kvrag.store.layout import Layout, remove_if_abandoned
from kvrag.store.quarantine import Quarantine
from kvrag.upkeep.orphans import collect_orphans

__all__ = ["Collected", "collect"]


@dataclass(frozen=True, slots=True)
class Collected:
    """How many blocks and files are, or would be, deleted.

    `nbytes`: of all copies of the orphans, and of the quarantine. `unreachable`: why a tier that
    outlives the process could not be asked, or not to the end, by its name.
    """

    orphans: int
    leftovers: int
    quarantined: int
    nbytes: int
    unreachable: dict[str, str]


def collect(settings: Settings, *, unused_s: float, dry_run: bool, waiting: Waiting) -> Collected:
    """Delete what nobody needs from the home's disk, and its orphans from Redis, too.

    Args:
        unused_s: seconds; orphans that were used since are kept.
        dry_run: whether to delete nothing.
        waiting: called before this waits for an import, whose blocks belong to nobody yet.

    Raises:
        SettingsError: there is no home, or none with a catalog: nobody knows what is an orphan.
        TierError: the home's disk cannot be used.
    """
    home = existing_home(settings)
    layout = Layout(home.kv)
    # Before the tiers are opened, which removes what crashes left half written.
    strange = [entry for key, entry in layout.walk() if key is None]
    if dry_run:
        leftovers = sum(entry.name.endswith(".tmp") for entry in strange)
    else:
        leftovers = sum(remove_if_abandoned(entry) for entry in strange)
    with nullcontext() if dry_run else only_job(home.import_lock, waiting):
        orphans = collect_orphans(settings, unused_s=unused_s, delete=not dry_run)
    quarantine = Quarantine(layout.quarantine)
    aside = quarantine.entries()
    if not dry_run:
        quarantine.clear()
    return Collected(
        orphans=orphans.blocks,
        leftovers=leftovers,
        quarantined=len(aside),
        nbytes=orphans.nbytes + sum(aside.values()),
        unreachable=orphans.failed,
    )
