"""The books of one tier: which blocks it holds, how many bytes, and which may go.

    reserve(key, nbytes) -> Reservation | None   room for a write; names the victims to delete
        evicted(reservation, victim)               one victim is deleted
        commit(reservation)                        the write landed
        abort(reservation)                         it did not; victims not deleted are back
    pin(key) -> Receipt | None, unpin(receipt)   a pinned block is no victim
    protect(key), unprotect(key)                 nor is a protected one
    touch(key), remove(key), adopt(key, nbytes)

The ledger moves no bytes: who asks deletes and writes, and no lock is held meanwhile. `used_nbytes`
is at every instant the sum of the entries and the open reservations, and never above the limit; but
a ledger that starts with more than the limit (it was lowered) keeps it until room is needed, since
only then is it known what is protected. At most one reservation a key is open at a time; the caller
sees to it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .eviction import Policy, lru

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .keys import BlockKey

__all__ = ["Entry", "Ledger", "Receipt", "Reservation"]


@dataclass(slots=True)
class Entry:
    """One block: its size, who holds it, and the count of uses at which it was last used."""

    nbytes: int
    last_used: int
    pins: int = 0
    protected: bool = False


@dataclass(slots=True, eq=False)
class Receipt:
    """Shown to release a pin. Holds the entry itself: a block that was removed and came back under
    the same key does not lose the pins of others to an old receipt.
    """

    key: BlockKey
    _entry: Entry
    _released: bool = False


@dataclass(slots=True, eq=False)
class Reservation:
    """Room for one write. `victims` must be deleted, and each reported, before the write starts."""

    key: BlockKey
    nbytes: int
    _charged: int  # what it takes besides the entry it replaces, which stays until the commit
    _replaced: Entry | None = None
    _leaving: dict[BlockKey, Entry] = field(default_factory=dict)

    @property
    def victims(self) -> tuple[BlockKey, ...]:
        """Blocks still to be deleted."""
        return tuple(self._leaving)


class Ledger:
    """The books of one tier under `limit_bytes` (None: no limit). Thread-safe."""

    def __init__(self, limit_bytes: int | None, *, policy: Policy = lru) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"limit_bytes must be at least 0, or None, got {limit_bytes}")
        self.limit_bytes = limit_bytes
        self._policy = policy
        self._lock = threading.Condition()
        self._entries: OrderedDict[BlockKey, Entry] = OrderedDict()
        self._reserved: dict[BlockKey, Reservation] = {}
        self._leaving: set[BlockKey] = set()
        self._used = 0
        self._clock = 0

    @property
    def used_nbytes(self) -> int:
        """Bytes of the entries and the open reservations."""
        with self._lock:
            return self._used

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __contains__(self, key: BlockKey) -> bool:
        with self._lock:
            return key in self._entries

    def load(self, held: Iterable[tuple[BlockKey, int]]) -> None:
        """Enter what a tier holds at the start, the least recently used first."""
        with self._lock:
            for key, nbytes in held:
                if key not in self._entries and key not in self._leaving:
                    self._add_locked(key, nbytes)

    def reserve(self, key: BlockKey, nbytes: int) -> Reservation | None:
        """Room to write `nbytes` under `key`, or None if there is none even after evicting.

        Waits while the block of that key is being deleted as another one's victim. Raises
        `ValueError` if a reservation of that key is open.
        """
        with self._lock:
            while key in self._leaving:
                self._lock.wait()
            if key in self._reserved:
                raise ValueError(f"{key} is being written already")
            present = self._entries.get(key)
            charged = max(0, nbytes - (present.nbytes if present is not None else 0))
            if self.limit_bytes is None:
                victims: list[BlockKey] | None = []
            elif nbytes > self.limit_bytes:
                victims = None
            else:
                victims = self._victims_locked(key, self._used + charged - self.limit_bytes)
            if victims is None:
                return None
            reservation = self._reserved[key] = Reservation(key, nbytes, charged, present)
            for victim in victims:
                entry = self._entries.pop(victim)
                reservation._leaving[victim] = entry
                self._used -= entry.nbytes
            self._leaving.update(victims)
            self._used += charged
            if present is not None:
                present.pins += 1  # the copy being replaced is nobody's victim
            return reservation

    def evicted(self, reservation: Reservation, victim: BlockKey) -> None:
        """A victim is deleted from the tier."""
        with self._lock:
            del reservation._leaving[victim]
            self._leaving.discard(victim)
            self._lock.notify_all()

    def commit(self, reservation: Reservation, *, protected: bool = False) -> None:
        """The write landed. Raises `ValueError` if victims are left, or it was closed before."""
        with self._lock:
            if reservation._leaving:
                raise ValueError(f"{len(reservation._leaving)} victims are not deleted yet")
            present = self._close_locked(reservation)
            if present is None:
                present = self._add_locked(reservation.key, reservation.nbytes)
            else:
                self._used += reservation.nbytes - present.nbytes
                present.nbytes = reservation.nbytes
                self._touch_locked(reservation.key, present)
            present.protected = present.protected or protected

    def abort(self, reservation: Reservation) -> None:
        """The write did not land. Victims not reported as deleted are entries again."""
        with self._lock:
            self._close_locked(reservation)
            for victim, entry in reversed(reservation._leaving.items()):
                self._entries[victim] = entry
                self._entries.move_to_end(victim, last=False)
                self._used += entry.nbytes
                self._leaving.discard(victim)
            reservation._leaving.clear()
            self._lock.notify_all()

    def adopt(self, key: BlockKey, nbytes: int) -> Receipt | None:
        """Enter and pin a block that another process wrote; None if there is no free room for it.

        Nothing is evicted for it: it was not ours to write.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                full = self.limit_bytes is not None and self._used + nbytes > self.limit_bytes
                if full or key in self._leaving:
                    return None
                entry = self._add_locked(key, nbytes)
            entry.pins += 1
            return Receipt(key, entry)

    def pin(self, key: BlockKey) -> Receipt | None:
        """Keep the block from being evicted until `unpin`; None if it is not entered."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            entry.pins += 1
            return Receipt(key, entry)

    def unpin(self, receipt: Receipt) -> None:
        """Release one pin. A second call with the same receipt does nothing."""
        with self._lock:
            if not receipt._released:
                receipt._released = True
                receipt._entry.pins -= 1

    def touch(self, key: BlockKey) -> bool:
        """Note a use; whether the block is entered."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._touch_locked(key, entry)
            return entry is not None

    def protect(self, key: BlockKey) -> bool:
        """Never choose the block as a victim; whether it is entered."""
        return self._set_protected(key, True)

    def unprotect(self, key: BlockKey) -> bool:
        """Undo `protect`; whether the block is entered."""
        return self._set_protected(key, False)

    def remove(self, key: BlockKey) -> bool:
        """The tier does not hold the block any more, pinned or not; whether it was entered."""
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is None:
                return False
            self._used -= entry.nbytes
            reservation = self._reserved.get(key)
            if reservation is not None and reservation._replaced is entry:
                # What it counted on has gone: it takes its whole size now, no more than was freed.
                self._used += reservation.nbytes - reservation._charged
                reservation._charged = reservation.nbytes
                reservation._replaced = None
            return True

    def _set_protected(self, key: BlockKey, protected: bool) -> bool:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.protected = protected
            return entry is not None

    def _victims_locked(self, key: BlockKey, missing: int) -> list[BlockKey] | None:
        if missing <= 0:
            return []
        victims = []
        for candidate, entry in self._in_turn_locked():
            if entry.pins or entry.protected or candidate == key:
                continue
            victims.append(candidate)
            missing -= entry.nbytes
            if missing <= 0:
                return victims
        return None

    def _in_turn_locked(self) -> Iterable[tuple[BlockKey, Entry]]:
        if self._policy is lru:  # the order they are kept in: no need to look at all of them
            return self._entries.items()
        return sorted(self._entries.items(), key=lambda item: self._policy(item[1]))

    def _close_locked(self, reservation: Reservation) -> Entry | None:
        if self._reserved.get(reservation.key) is not reservation:
            raise ValueError("the reservation is closed already")
        del self._reserved[reservation.key]
        self._used -= reservation._charged
        if reservation._replaced is not None:
            reservation._replaced.pins -= 1
        return self._entries.get(reservation.key)

    def _add_locked(self, key: BlockKey, nbytes: int) -> Entry:
        self._clock += 1
        entry = self._entries[key] = Entry(nbytes, self._clock)
        self._used += nbytes
        return entry

    def _touch_locked(self, key: BlockKey, entry: Entry) -> None:
        self._clock += 1
        entry.last_used = self._clock
        self._entries.move_to_end(key)
