"""Deleting blocks that no corpus refers to, what crashes left half written, and the quarantine."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from kvrag.errors import SettingsError
from kvrag.home import Home
from kvrag.store.disk import DiskTier
from kvrag.store.layout import Layout, remove_if_abandoned
from kvrag.store.quarantine import Quarantine

__all__ = ["Collected", "collect"]


@dataclass(frozen=True, slots=True)
class Collected:
    """How many blocks and files are, or would be, deleted; `nbytes` of orphans and quarantine."""

    orphans: int
    leftovers: int
    quarantined: int
    nbytes: int


def collect(home: Home, *, unused_s: float, dry_run: bool) -> Collected:
    """Delete from the home's disk what nobody needs, of all namespaces.

    Args:
        unused_s: seconds; orphans that were used since are kept.
        dry_run: whether to delete nothing.

    Raises:
        SettingsError: the home has no catalog, so nobody knows what is an orphan.
    """
    layout = Layout(home.kv)
    strange = [entry for key, entry in layout.walk() if key is None]
    if dry_run:
        leftovers = sum(entry.name.endswith(".tmp") for entry in strange)
    else:
        leftovers = sum(remove_if_abandoned(entry) for entry in strange)
    with closing(DiskTier(home.kv)) as tier:
        # Listed before the catalog is read: a job refers to a block before it writes it.
        held = [entry for entry in tier.entries() if entry.idle_s >= unused_s]
        referred = home.referred_keys()
        if referred is None:
            raise SettingsError(
                f"home {home.path} has no catalog, so nobody knows what its corpus refers to; if "
                f"there is none, delete {home.kv}"
            )
        orphans = [entry for entry in held if entry.key not in referred]
        if not dry_run:
            for entry in orphans:
                tier.delete(entry.key)
    quarantine = Quarantine(layout.quarantine)
    aside = quarantine.entries()
    if not dry_run:
        quarantine.clear()
    nbytes = sum(entry.nbytes for entry in orphans) + sum(aside.values())
    return Collected(len(orphans), leftovers, len(aside), nbytes)
