"""Eviction policies: which block of a tier goes first. Functions of entries alone, without I/O.

A policy is a key function, `rank`: the entry with the smallest goes first. So that nobody has to
look at a million entries, a policy also says which `group` an entry belongs to, and within a group
ranks never fall as time goes by: each group is a queue, and the next victim heads one of them.

    lru      the least recently used goes first
    lfu      the least often used, the least recently used of those
    cost     the one whose bytes save the least computing (GreedyDual-Size-Frequency)
    s3-fifo  a small queue sifts out what is used once; what is left gets further chances
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from .entries import Entry

__all__ = ["POLICIES", "CostAware", "Lfu", "Lru", "Policy", "S3Fifo", "Spared", "policy_named"]


class Spared(NamedTuple):
    """What becomes of an entry that is not evicted after all: its new group and count of uses."""

    group: float
    uses: int


class Policy(ABC):
    """Stateless. `now` counts what happened so far; `age` is the largest rank evicted so far."""

    name: ClassVar[str]
    #: Uses are counted up to here, so that the number costs no memory.
    most_uses: ClassVar[int] = 255
    #: Whether a use leaves an entry at its place in the queue.
    keeps_place: ClassVar[bool] = False

    def group(self, entry: Entry, *, remembered: bool = False) -> float:
        """The queue that an entry joins when it is entered or used."""
        return 0

    @abstractmethod
    def rank(self, entry: Entry, now: int, age: float) -> float:
        """The key, as of when the entry joins a queue: the smallest goes first."""

    def pick(self, heads: Sequence[Entry]) -> Entry:
        """The next victim among the first evictable entries of one pool's queues."""
        return min(heads, key=lambda entry: entry.rank)

    def spare(self, entry: Entry) -> Spared | None:
        """Whether the entry picked stays, and where; asked a bounded number of times."""
        return None

    def remembers(self, entry: Entry) -> bool:
        """Whether the key of an entry that was evicted is remembered for a while."""
        return False


class Lru(Policy):
    """The least recently used first."""

    name = "lru"

    def rank(self, entry: Entry, now: int, age: float) -> float:
        return now


class Lfu(Policy):
    """The least often used first, and of those the least recently used. Counts up to 255."""

    name = "lfu"

    def group(self, entry: Entry, *, remembered: bool = False) -> float:
        return entry.uses

    def rank(self, entry: Entry, now: int, age: float) -> float:
        return entry.uses


class CostAware(Policy):
    """The one first whose bytes save the least computing: age + uses x cost / bytes.

    Cherkasova 1998 ("Improving WWW proxies performance with greedy-dual-size-frequency caching"),
    which RAGCache (arXiv 2404.12457, section 5.1) takes for KV, there with the cost of prefill. The
    age makes what was valuable long ago give way. The value is rounded to four significant bits, as
    CAMP does (Ghandeharizadeh et al., Middleware 2014), so that there are few queues.
    """

    name = "cost"

    def group(self, entry: Entry, *, remembered: bool = False) -> float:
        return _rounded((entry.uses + 1) * entry.cost / entry.nbytes) if entry.nbytes else 0

    def rank(self, entry: Entry, now: int, age: float) -> float:
        return age + self.group(entry)


class S3Fifo(Policy):
    """Two queues in order of entering: a small one sifts out what is used once.

    Yang et al., SOSP 2023 ("FIFO queues are all you need for cache eviction"), section 4. A tenth
    of the bytes is the small queue's. What heads it moves to the main queue if it was used twice,
    else it goes, and its key is remembered: if it comes again, it enters the main queue. What heads
    that one stays as often as it was used, three times at most.
    """

    name = "s3-fifo"
    most_uses = 3
    keeps_place = True
    SMALL, MAIN = 0, 1
    _SMALL_SHARE = 0.1

    def group(self, entry: Entry, *, remembered: bool = False) -> float:
        return self.MAIN if remembered else self.SMALL

    def rank(self, entry: Entry, now: int, age: float) -> float:
        return now

    def pick(self, heads: Sequence[Entry]) -> Entry:
        for entry in heads:
            queue = entry.queue
            if queue is not None and queue.group == self.SMALL:
                if len(heads) == 1 or queue.nbytes > self._SMALL_SHARE * queue.pool.nbytes:
                    return entry
            elif len(heads) == 1:
                return entry
        return next(e for e in heads if e.queue is not None and e.queue.group == self.MAIN)

    def spare(self, entry: Entry) -> Spared | None:
        if entry.queue is not None and entry.queue.group == self.SMALL:
            return Spared(self.MAIN, 0) if entry.uses > 1 else None
        return Spared(self.MAIN, entry.uses - 1) if entry.uses else None

    def remembers(self, entry: Entry) -> bool:
        return entry.queue is not None and entry.queue.group == self.SMALL


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Lru, Lfu, CostAware, S3Fifo)
}


def policy_named(name: str) -> Policy:
    """The policy of that name. Raises `ValueError`."""
    if name not in POLICIES:
        raise ValueError(f"a policy is one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]()


def _rounded(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.ceil(mantissa * 16), exponent - 4)
