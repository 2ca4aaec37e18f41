"""The books of one tier: which blocks it holds, how many bytes, whose, and which may go.

    reserve(key, nbytes) -> Reservation | None   room for a write; names the victims to delete
    shed() -> Reservation | None                 for no write: names one block beyond the limits
        evicted(reservation, victim)               one victim is deleted
        commit(reservation)                        the write landed
        abort(reservation)                         it did not, or there was none to come; victims
                                                   not deleted are back
    pin(key) -> Receipt | None, unpin(receipt)   a pinned block is no victim
    stand(key, standing)                         nor is one that is kept
    touch(key), remove(key), adopt(key, nbytes)
    is_idle(key)                                 whether nobody used it for the time to live
    idle()                                       some of those that are, going round all

The ledger moves no bytes: who asks deletes and writes, and no lock is held meanwhile. `used_nbytes`
is at every instant the sum of the entries and the open reservations, and never above the limit; but
a ledger that starts with more than the limit (it was lowered) keeps it until room is needed, or who
knows what must stay sheds it. The same holds for the quota of each namespace. At most one
reservation a key is open at a time; the caller sees to it.

Who exceeds the quota makes room from blocks of the same namespace alone. A reserved share of the
limit is for blocks that a corpus refers to: down to it, they give way to their like only.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .books import Books, pool_of
from .entries import Entry, Standing
from .eviction import Lru, Policy
from .keys import NO_BLOCK, BlockKey, packed, unpacked
from .limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Entry", "Ledger", "Limits", "Receipt", "Reservation", "Standing"]

#: Blocks looked at in one call for their time to live: half a millisecond.
_LOOKED_AT = 1024


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
    cost: int
    _charged: int  # what it takes besides the entry it replaces, which stays until the commit
    _replaced: Entry | None = None
    _leaving: dict[BlockKey, Entry] = field(default_factory=dict)

    @property
    def victims(self) -> tuple[BlockKey, ...]:
        """Blocks still to be deleted."""
        return tuple(self._leaving)


class Ledger(Books):
    """The books of one tier. Thread-safe. `limits`: a number is that of all bytes."""

    def __init__(
        self,
        limits: Limits | int | None,
        *,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            limits if isinstance(limits, Limits) else Limits(limits),
            policy if policy is not None else Lru(),
            clock,
        )
        self._lock = threading.Condition()
        self._reserved: dict[BlockKey, Reservation] = {}
        self._leaving: set[BlockKey] = set()
        self._to_look_at: list[bytes] = []

    @property
    def used_nbytes(self) -> int:
        """Bytes of the entries and the open reservations."""
        with self._lock:
            return self._used_nbytes

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __contains__(self, key: BlockKey) -> bool:
        with self._lock:
            return packed(key) in self._entries

    def load(self, held: Iterable[tuple[BlockKey, int, float]]) -> None:
        """Enter what a tier holds at the start, the least recently used first.

        `held`: key, size, and for how many seconds it was not used.
        """
        with self._lock:
            now_s = self._clock()
            for key, nbytes, idle_s in held:
                if packed(key) not in self._entries and key not in self._leaving:
                    self._add_locked(key, nbytes, 0).used_s = int(now_s - idle_s)

    def reserve(
        self,
        key: BlockKey,
        nbytes: int,
        *,
        cost: int = 0,
        standing: Standing = Standing.PASSING,
    ) -> Reservation | None:
        """Room to write `nbytes` under `key`, or None if there is none even after evicting.

        Waits while the block of that key is being deleted as another one's victim. Raises
        `ValueError` if a reservation of that key is open.
        """
        with self._lock:
            while key in self._leaving:
                self._lock.wait()
            if key in self._reserved:
                raise ValueError(f"{key} is being written already")
            present = self._entries.get(packed(key))
            charged = max(0, nbytes - (present.nbytes if present is not None else 0))
            victims = self._victims_locked(key, nbytes, charged, standing)
            if victims is None:
                return None
            reservation = Reservation(key, nbytes, cost, charged, present)
            self._reserved[key] = reservation
            reservation._leaving.update(victims)
            self._leaving.update(victims)
            self._charge_locked(key.tag, charged)
            if present is not None:
                present.pins += 1  # the copy being replaced is nobody's victim
            return reservation

    def shed(self) -> Reservation | None:
        """One victim of a namespace, or of a tier, that holds more than its limit.

        None if none does, or what does has nothing to give up, or one is open already. End it by
        `abort`.
        """
        quota = self.limits.namespace_nbytes
        with self._lock:
            if NO_BLOCK in self._reserved:
                return None
            over = [] if quota is None else [tag for tag, n in self._used.items() if n > quota]
            tags = [*over, None] if self._over("", 0)[1] > 0 else over
            for tag in tags:
                victim = self._choose_locked(tag, 0, Standing.CORPUS, b"")
                if victim is not None:
                    reservation = Reservation(NO_BLOCK, 0, 0, 0)
                    self._reserved[NO_BLOCK] = reservation
                    self._take_locked(victim, reservation._leaving)
                    self._leaving.update(reservation._leaving)
                    return reservation
            return None

    def refusal(self, key: BlockKey, nbytes: int) -> str:
        """Why there is no room, as a sentence."""
        quota = self.limits.namespace_nbytes
        with self._lock:
            used = self._used[key.tag]
        if quota is not None and used + nbytes > quota:
            return (
                f"{nbytes} bytes do not fit the namespace's quota of {quota}, of which {used} are "
                "used, and what it may give up there is not enough"
            )
        return f"{nbytes} bytes do not fit the limit of {self.limits.nbytes}"

    def evicted(self, reservation: Reservation, victim: BlockKey) -> None:
        """A victim is deleted from the tier."""
        with self._lock:
            entry = reservation._leaving.pop(victim)
            self._leaving.discard(victim)
            self._age = max(self._age, entry.rank)
            if self.policy.remembers(entry):
                self._remember_locked(entry.packed)
            self._lock.notify_all()

    def commit(self, reservation: Reservation, *, standing: Standing = Standing.PASSING) -> None:
        """The write landed. Raises `ValueError` if victims are left, or it was closed before.

        An entry that is replaced keeps a higher standing.
        """
        with self._lock:
            if reservation._leaving:
                raise ValueError(f"{len(reservation._leaving)} victims are not deleted yet")
            present = self._close_locked(reservation)
            key = reservation.key
            if present is None:
                self._add_locked(key, reservation.nbytes, reservation.cost, standing)
                return
            pool = pool_of(present)
            pool.leave(present)
            self._charge_locked(key.tag, reservation.nbytes - present.nbytes)
            present.nbytes = self._shared_locked(reservation.nbytes)
            present.cost = self._shared_locked(reservation.cost)
            self._enter_locked(present, key.tag, max(pool.standing, standing))

    def abort(self, reservation: Reservation) -> None:
        """The write did not land. Victims not reported as deleted are entries again."""
        with self._lock:
            self._close_locked(reservation)
            self._restore_locked(reservation._leaving)
            self._leaving.difference_update(reservation._leaving)
            reservation._leaving.clear()
            self._lock.notify_all()

    def adopt(self, key: BlockKey, nbytes: int, *, cost: int = 0) -> Receipt | None:
        """Enter and pin a block that another process wrote; None if there is no free room for it.

        Nothing is evicted for it: it was not ours to write.
        """
        with self._lock:
            entry = self._entries.get(packed(key))
            if entry is None:
                if key in self._leaving or any(over > 0 for over in self._over(key.tag, nbytes)):
                    return None
                entry = self._add_locked(key, nbytes, cost)
            entry.pins += 1
            return Receipt(key, entry)

    def pin(self, key: BlockKey) -> Receipt | None:
        """Keep the block from being evicted until `unpin`; None if it is not entered."""
        with self._lock:
            entry = self._entries.get(packed(key))
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

    def touch(self, key: BlockKey, *, cost: int | None = None, idle_s: float = 0.0) -> bool:
        """Note a use, and what the block costs if that is known now; whether it is entered.

        `idle_s`: for how many seconds it was not used since.
        """
        with self._lock:
            entry = self._entries.get(packed(key))
            if entry is None:
                return False
            entry.uses = min(entry.uses + 1, self.policy.most_uses)
            entry.used_s = int(self._clock() - idle_s)
            if cost is not None:
                entry.cost = self._shared_locked(cost)
            if not self.policy.keeps_place:
                pool = pool_of(entry)
                pool.leave(entry)
                self._join_locked(pool, entry, self.policy.group(entry))
            return True

    def stand(self, key: BlockKey, standing: Standing) -> bytes | None:
        """Set what the block is to a corpus; the packed key held here, if the block is entered.

        A block whose standing changes joins its queue as if it were used now. Who keeps a set of
        packed keys keeps that object, and needs no memory of their own for it.
        """
        with self._lock:
            entry = self._entries.get(packed(key))
            if entry is None:
                return None
            pool = pool_of(entry)
            if pool.standing != standing:
                group = entry.queue.group if entry.queue is not None else 0
                pool.leave(entry)
                self._join_locked(self._pool_locked(key.tag, standing), entry, group)
            return entry.packed

    def remove(self, key: BlockKey) -> bool:
        """The tier does not hold the block any more, pinned or not; whether it was entered."""
        with self._lock:
            entry = self._entries.pop(packed(key), None)
            if entry is None:
                return False
            pool_of(entry).leave(entry)
            freed = entry.nbytes
            reservation = self._reserved.get(key)
            if reservation is not None and reservation._replaced is entry:
                # What it counted on has gone: it takes its whole size now, no more than was freed.
                freed -= reservation.nbytes - reservation._charged
                reservation._charged = reservation.nbytes
                reservation._replaced = None
            self._charge_locked(key.tag, -freed)
            return True

    def is_idle(self, key: BlockKey) -> bool:
        """Whether the time to live of a block has passed that nobody has open."""
        if self.limits.ttl_s is None:
            return False
        with self._lock:
            entry = self._entries.get(packed(key))
            return entry is not None and self._is_idle_locked(entry)

    def idle(self, most: int) -> list[BlockKey]:
        """Some blocks whose time to live has passed, at most `most`.

        Calls go round all blocks, a bounded number at a time: queues are no help, since a policy
        may leave what is used in its place, in front of what is not.
        """
        if self.limits.ttl_s is None:
            return []
        found: list[BlockKey] = []
        with self._lock:
            if not self._to_look_at:
                self._to_look_at.extend(reversed(self._entries))
            for _ in range(min(_LOOKED_AT, len(self._to_look_at))):
                entry = self._entries.get(self._to_look_at.pop())
                if entry is not None and self._is_idle_locked(entry):
                    found.append(unpacked(entry.packed))
                    if len(found) == most:
                        break
        return found

    # -- all below with the lock held --------------------------------------------------------------

    def _is_idle_locked(self, entry: Entry) -> bool:
        ttl_s = self.limits.ttl_s
        if ttl_s is None or entry.pins or pool_of(entry).standing is not Standing.PASSING:
            return False
        return self._clock() - entry.used_s > ttl_s

    def _close_locked(self, reservation: Reservation) -> Entry | None:
        if self._reserved.get(reservation.key) is not reservation:
            raise ValueError("the reservation is closed already")
        del self._reserved[reservation.key]
        self._charge_locked(reservation.key.tag, -reservation._charged)
        if reservation._replaced is not None:
            reservation._replaced.pins -= 1
        return self._entries.get(packed(reservation.key))
