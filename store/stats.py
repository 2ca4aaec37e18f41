"""What the store counts. Plain numbers: who exports them gives them names and units."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StoreStats", "TierStats"]


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier since the store was opened.

    `nbytes` is what its ledger holds (entries and open reservations) of `limit_bytes`, `blocks` the
    number of entries. `hits` and `misses` count opened blocks looked up here. `damaged` counts
    copies quarantined, `errors` failed operations, `healthy` whether the last one worked.
    """

    name: str
    durable: bool
    healthy: bool
    nbytes: int
    limit_bytes: int | None
    blocks: int
    hits: int
    misses: int
    bytes_read: int
    bytes_written: int
    evictions: int
    damaged: int
    errors: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """All tiers, fastest first, and the number of blocks being read now."""

    tiers: tuple[TierStats, ...]
    open_blocks: int
