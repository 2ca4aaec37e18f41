"""What the store counts. Plain numbers: who exports them gives them names and units."""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass

__all__ = ["LATENCY_BOUNDS_S", "Latency", "LatencyCounter", "StoreStats", "TierStats"]

#: Upper ends of the buckets: 16 us, doubled up to 16.8 s. What takes longer is in one bucket more.
LATENCY_BOUNDS_S: tuple[float, ...] = tuple(16e-6 * 2**power for power in range(21))


@dataclass(frozen=True, slots=True)
class Latency:
    """How long operations took: how many in each bucket (see `LATENCY_BOUNDS_S`), and the sum."""

    counts: tuple[int, ...]
    sum_s: float

    @property
    def count(self) -> int:
        return sum(self.counts)


class LatencyCounter:
    """Fills the buckets. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
        self._sum_s = 0.0

    def add(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
            self._sum_s += seconds

    def read(self) -> Latency:
        with self._lock:
            return Latency(tuple(self._counts), self._sum_s)


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier since the store was opened.

    `nbytes` is what its ledger holds (entries and open reservations) of `limit_bytes`, `blocks` the
    number of entries. `hits` and `misses` count opened blocks looked up here. `damaged` counts
    copies quarantined, `errors` failed operations, `healthy` whether the last one worked.
    `evictions` made room, `expired` were not used for the time to live, `refused` were not written:
    for want of room, or because the tier failed. `pending_blocks` and `pending_nbytes` wait to be
    written back. The latencies are of looking a block up, of one read, and of writing one.
    `listed_s`: for how many seconds the ledger has known what others put and deleted only where it
    came across that; None until the tier was listed, 0 for memory of this process.
    """

    name: str
    durable: bool
    policy: str
    healthy: bool
    nbytes: int
    limit_bytes: int | None
    blocks: int
    hits: int
    misses: int
    bytes_read: int
    bytes_written: int
    evictions: int
    expired: int
    refused: int
    damaged: int
    errors: int
    pending_blocks: int
    pending_nbytes: int
    lookup_latency: Latency
    read_latency: Latency
    write_latency: Latency
    listed_s: float | None


@dataclass(frozen=True, slots=True)
class StoreStats:
    """All tiers, fastest first, and the number of blocks being read now."""

    tiers: tuple[TierStats, ...]
    open_blocks: int
