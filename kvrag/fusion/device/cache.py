"""K and V of chunks on the device: verified, decoded, un-rotated, in front of the store.

It is no tier. What it holds has been verified on its way in, knows no codec, and goes with the
process. The books are the store's (`store/ledger.py`): room is reserved before anything is loaded,
so that requests that load at the same time stay under the limit together; what somebody uses is
pinned; the least recently used goes first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvrag.fusion.device.copy_stream import Event
from kvrag.fusion.stream import LayerKV
from kvrag.store.keys import BlockKey
from kvrag.store.ledger import Ledger, Reservation

__all__ = ["DeviceCache", "DeviceStats", "Lease", "Room"]


@dataclass(frozen=True, slots=True)
class DeviceStats:
    """Since the cache was made, but for `blocks` and `used_bytes`, which are now.

    used_bytes: of what is held and of what is being loaded; never above `limit_bytes`.
    """

    blocks: int
    used_bytes: int
    limit_bytes: int
    hits: int
    misses: int
    admissions: int
    evictions: int


@dataclass(frozen=True, slots=True)
class _Entry:
    layers: tuple[LayerKV, ...]
    ready: Event


class Lease:
    """The use of one chunk's K and V, which stay until it is closed.

    layers: un-rotated K and V of every layer, read-only. ready: what computes with them waits for
    it first.
    """

    def __init__(self, entry: _Entry, release: Callable[[], None]) -> None:
        self.layers, self.ready = entry.layers, entry.ready
        self._release = release

    def close(self) -> None:
        """End the use. A second call does nothing."""
        self._release()


class Room:
    """Room for one chunk's K and V; ends with `fill` or `close`."""

    def __init__(self, cache: DeviceCache, reservation: Reservation) -> None:
        self._cache, self._reservation = cache, reservation
        self._open = True

    def fill(self, layers: Sequence[LayerKV], ready: Event) -> None:
        """Admit the chunk: all layers, verified, in memory that nobody else writes to.

        Raises:
            ValueError: they take more bytes than were reserved, or the room is closed.
        """
        nbytes = sum(k.nbytes + v.nbytes for k, v in layers)
        if not self._open or nbytes > self._reservation.nbytes:
            raise ValueError(
                f"{nbytes} bytes for a room of {self._reservation.nbytes}"
                f"{'' if self._open else ', which is closed'}"
            )
        self._open = False
        self._cache._admit(self._reservation, _Entry(tuple(layers), ready))

    def close(self) -> None:
        """Give the room back if it was not filled. A second call does nothing."""
        if self._open:
            self._open = False
            self._cache._abort(self._reservation)


class DeviceCache:
    """See the module's text. Thread-safe.

    Args:
        limit_bytes: most bytes of K and V, of chunks that are being loaded included.

    Raises:
        ValueError: the limit is below 0.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._ledger, self._limit = Ledger(limit_bytes), limit_bytes
        self._lock = threading.Lock()
        self._entries: dict[BlockKey, _Entry] = {}
        self._filling: set[BlockKey] = set()
        self._hits = self._misses = self._admissions = self._evictions = 0

    def lease(self, key: BlockKey) -> Lease | None:
        """The chunk's K and V, or None for a miss. Close it."""
        with self._lock:
            receipt = self._ledger.pin(key)
            if receipt is None:
                self._misses += 1
                return None
            self._hits += 1
            self._ledger.touch(key)
            return Lease(self._entries[key], lambda: self._ledger.unpin(receipt))

    def reserve(self, key: BlockKey, nbytes: int) -> Room | None:
        """Room to load a chunk into, for which others may have to go.

        None if what is in use leaves none, or somebody holds or loads the chunk already.
        """
        with self._lock:
            if key in self._filling or key in self._entries:
                return None
            reservation = self._ledger.reserve(key, nbytes)
            if reservation is None:
                return None
            for victim in reservation.victims:
                del self._entries[victim]
                self._ledger.evicted(reservation, victim)
                self._evictions += 1
            self._filling.add(key)
            return Room(self, reservation)

    def clear(self) -> None:
        """Forget every chunk; those in use stay with who uses them, and no longer count here."""
        with self._lock:
            for key in self._entries:
                self._ledger.remove(key)
            self._entries.clear()

    def stats(self) -> DeviceStats:
        with self._lock:
            return DeviceStats(
                blocks=len(self._entries),
                used_bytes=self._ledger.used_nbytes,
                limit_bytes=self._limit,
                hits=self._hits,
                misses=self._misses,
                admissions=self._admissions,
                evictions=self._evictions,
            )

    def _admit(self, reservation: Reservation, entry: _Entry) -> None:
        with self._lock:
            self._filling.discard(reservation.key)
            self._ledger.commit(reservation)
            self._entries[reservation.key] = entry
            self._admissions += 1

    def _abort(self, reservation: Reservation) -> None:
        with self._lock:
            self._filling.discard(reservation.key)
            self._ledger.abort(reservation)
