"""What a ledger keeps of each block, and the queues that entries wait in until they are evicted.

An entry takes about 300 bytes with all that belongs to it: a store may hold a million. It is part
of two lists at once (the ledger's table and one queue), and every step on either is O(1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

__all__ = ["Entry", "Pool", "Queue", "Standing"]


class Standing(IntEnum):
    """What a block is to those who refer to it."""

    PASSING = 0  # no corpus refers to it
    CORPUS = 1  # one does, and this is not the copy that must stay
    KEPT = 2  # the last durable copy of a corpus's block: never a victim


@dataclass(slots=True, eq=False)
class Entry:
    """One block. `packed` is its key; `cost`, of computing it again, has the store's own unit.

    `uses` counts those since it was entered, as far as the policy counts; `used_s` is when the last
    one was, in whole seconds of the ledger's clock; `rank` is the policy's, as of when the entry
    joined its queue.
    """

    packed: bytes
    nbytes: int
    cost: int = 0
    uses: int = 0
    used_s: int = 0
    rank: float = 0.0
    pins: int = 0
    queue: Queue | None = None
    older: Entry | None = None
    newer: Entry | None = None


@dataclass(slots=True, eq=False)
class Queue:
    """Entries of one pool and group in the order in which they joined."""

    pool: Pool
    group: float
    nbytes: int = 0
    oldest: Entry | None = None
    newest: Entry | None = None

    def __iter__(self) -> Iterator[Entry]:
        entry = self.oldest
        while entry is not None:
            following = entry.newer
            yield entry
            entry = following

    def first_free(self, excluded: bytes | None = None) -> Entry | None:
        """The oldest entry that is neither pinned nor the excluded one."""
        for entry in self:
            if not entry.pins and entry.packed != excluded:
                return entry
        return None


@dataclass(slots=True, eq=False)
class Pool:
    """The entries of one namespace (`tag`) and standing, in one queue a group."""

    tag: str
    standing: Standing
    nbytes: int = 0
    queues: dict[float, Queue] = field(default_factory=dict)

    def join(self, entry: Entry, group: float, *, first: bool = False) -> None:
        """Put the entry at the end of a queue, or at its front."""
        queue = self.queues.get(group)
        if queue is None:
            queue = self.queues[group] = Queue(self, group)
        entry.queue = queue
        entry.older = None if first else queue.newest
        entry.newer = queue.oldest if first else None
        if entry.older is None:
            queue.oldest = entry
        else:
            entry.older.newer = entry
        if entry.newer is None:
            queue.newest = entry
        else:
            entry.newer.older = entry
        queue.nbytes += entry.nbytes
        self.nbytes += entry.nbytes

    def leave(self, entry: Entry) -> None:
        """Take the entry out of its queue, which it goes on to name."""
        queue = entry.queue
        if queue is None:
            return
        if entry.older is None:
            queue.oldest = entry.newer
        else:
            entry.older.newer = entry.newer
        if entry.newer is None:
            queue.newest = entry.older
        else:
            entry.newer.older = entry.older
        entry.older = entry.newer = None
        queue.nbytes -= entry.nbytes
        self.nbytes -= entry.nbytes
        if queue.oldest is None:
            self.queues.pop(queue.group, None)
