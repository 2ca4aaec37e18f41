"""The entries of a ledger, their sums, and who goes next: victims, and the chances they get.

Not thread-safe: the ledger, which is built on this, holds its lock around every call.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from .entries import Entry, Pool, Standing
from .keys import BlockKey, packed, unpacked

if TYPE_CHECKING:
    from collections.abc import Callable

    from .eviction import Policy
    from .limits import Limits

__all__ = ["Books", "pool_of"]

#: Entries moved to another place instead of being evicted, for one victim. A longer search would
#: evict better, and make somebody wait.
_MOST_SPARED = 32
#: Keys remembered by a policy that wants it: as many as there are entries, but within these bounds.
_REMEMBERED = (1024, 65536)
_MOST_NUMBERS = 4096


class Books:
    """See the module's text."""

    def __init__(self, limits: Limits, policy: Policy, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.policy = policy
        self._clock = clock
        self._entries: dict[bytes, Entry] = {}
        self._pools: dict[tuple[str, Standing], Pool] = {}
        self._used: Counter[str] = Counter()  # bytes by namespace tag
        self._used_nbytes = 0
        self._now = 0
        self._age = 0.0
        self._remembered: OrderedDict[bytes, None] = OrderedDict()
        self._numbers: dict[int, int] = {}

    def _over(self, tag: str, charged: int) -> tuple[float, float]:
        """By how many bytes more than allowed: of the namespace, and of all."""
        return (
            self._used[tag] + charged - _or_inf(self.limits.namespace_nbytes),
            self._used_nbytes + charged - _or_inf(self.limits.nbytes),
        )

    def _victims_locked(
        self, key: BlockKey, nbytes: int, charged: int, standing: Standing
    ) -> dict[BlockKey, Entry] | None:
        """Taken out of the books; None, and nothing is, if they are not enough."""
        limits = self.limits
        if nbytes > min(_or_inf(limits.nbytes), _or_inf(limits.namespace_nbytes)):
            return None
        victims: dict[BlockKey, Entry] = {}
        excluded = packed(key)
        # Its own first: what they free counts for the whole tier, too.
        for scope, tag in enumerate((key.tag, None)):
            while (over := self._over(key.tag, charged)[scope]) > 0:
                victim = self._choose_locked(tag, over, standing, excluded)
                if victim is None:
                    self._restore_locked(victims)
                    return None
                self._take_locked(victim, victims)
        return victims

    def _take_locked(self, victim: Entry, victims: dict[BlockKey, Entry]) -> None:
        """Out of the books, and among those that are to be deleted."""
        pool = pool_of(victim)
        pool.leave(victim)
        del self._entries[victim.packed]
        self._charge_locked(pool.tag, -victim.nbytes)
        victims[unpacked(victim.packed)] = victim

    def _choose_locked(
        self, tag: str | None, over: float, standing: Standing, excluded: bytes
    ) -> Entry | None:
        """The next victim, of one namespace or of all; None if `over` bytes are not to be had."""
        pools = [
            pool
            for pool in self._pools.values()
            if pool.queues and tag in (None, pool.tag) and pool.standing is not Standing.KEPT
        ]
        if sum(pool.nbytes for pool in pools) < over:
            return None
        free = float("inf")
        if standing is Standing.PASSING and self.limits.reserved_share:
            referred = (p.nbytes for p in self._pools.values() if p.standing > Standing.PASSING)
            free = sum(referred) - self.limits.reserved_nbytes
        heads = (self._head_locked(pool, excluded) for pool in pools)
        found = [
            entry
            for entry in heads
            if entry is not None
            and (pool_of(entry).standing is Standing.PASSING or entry.nbytes <= free)
        ]
        return min(found, key=lambda entry: entry.rank, default=None)

    def _head_locked(self, pool: Pool, excluded: bytes) -> Entry | None:
        """What this pool would give up next."""
        for chance in range(_MOST_SPARED + 1):
            heads = [queue.first_free(excluded) for queue in pool.queues.values()]
            free = [entry for entry in heads if entry is not None]
            if not free:
                return None
            entry = self.policy.pick(free)
            spared = self.policy.spare(entry)
            if spared is None or chance == _MOST_SPARED:
                return entry
            pool.leave(entry)
            entry.uses = spared.uses
            self._join_locked(pool, entry, spared.group)
        return None

    def _restore_locked(self, victims: dict[BlockKey, Entry]) -> None:
        """Undo the choice of victims: each is back where it was, the first one first."""
        for victim, entry in reversed(victims.items()):
            self._entries[entry.packed] = entry
            group = entry.queue.group if entry.queue is not None else 0
            pool_of(entry).join(entry, group, first=True)
            self._charge_locked(victim.tag, entry.nbytes)

    def _add_locked(
        self, key: BlockKey, nbytes: int, cost: int, standing: Standing = Standing.PASSING
    ) -> Entry:
        name = packed(key)
        entry = Entry(name, self._shared_locked(nbytes), self._shared_locked(cost))
        self._entries[name] = entry
        self._charge_locked(key.tag, nbytes)
        remembered = name in self._remembered
        if remembered:
            del self._remembered[name]
        self._enter_locked(entry, key.tag, standing, remembered=remembered)
        return entry

    def _enter_locked(
        self, entry: Entry, tag: str, standing: Standing, *, remembered: bool = False
    ) -> None:
        entry.used_s = int(self._clock())
        group = self.policy.group(entry, remembered=remembered)
        self._join_locked(self._pool_locked(tag, standing), entry, group)

    def _join_locked(self, pool: Pool, entry: Entry, group: float) -> None:
        self._now += 1
        entry.rank = self.policy.rank(entry, self._now, self._age)
        pool.join(entry, group)

    def _pool_locked(self, tag: str, standing: Standing) -> Pool:
        pool = self._pools.get((tag, standing))
        if pool is None:
            pool = self._pools[tag, standing] = Pool(tag, standing)
        return pool

    def _charge_locked(self, tag: str, nbytes: int) -> None:
        self._used[tag] += nbytes
        self._used_nbytes += nbytes

    def _remember_locked(self, name: bytes) -> None:
        self._remembered[name] = None
        most = min(max(_REMEMBERED[0], len(self._entries)), _REMEMBERED[1])
        while len(self._remembered) > most:
            self._remembered.popitem(last=False)

    def _shared_locked(self, number: int) -> int:
        """The number, as one object: sizes and costs repeat, and a million would take 32 MB."""
        if len(self._numbers) > _MOST_NUMBERS:
            self._numbers.clear()
        return self._numbers.setdefault(number, number)


def pool_of(entry: Entry) -> Pool:
    if entry.queue is None:
        raise ValueError("the entry never joined a queue")
    return entry.queue.pool


def _or_inf(nbytes: int | None) -> float:
    return float("inf") if nbytes is None else nbytes
