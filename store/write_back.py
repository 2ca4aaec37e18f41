"""Blocks on their way from memory to a durable tier: a bounded queue and one thread.

What waits here lies whole in a faster tier, pinned, and is read from there when its turn comes: the
queue itself holds keys. When it is full, it takes no more, and the caller writes through. A crash
loses what waits, each block whole or not at all; `close` writes all of it first.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .keys import BlockKey
    from .ledger import Receipt
    from .slot import Slot

__all__ = ["Pending", "WriteBack"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """One write that is owed: from the slot that the block is pinned in to another."""

    key: BlockKey
    nbytes: int
    source: Slot
    receipt: Receipt
    target: Slot


class WriteBack:
    """See the module's text. Thread-safe.

    `write` does one write, and is called by one thread, with no lock held; the pin is released when
    it returns. Raises `ValueError` for a bound below 0.
    """

    def __init__(self, write: Callable[[Pending], None], *, most_nbytes: int) -> None:
        if most_nbytes < 0:
            raise ValueError(f"most_nbytes must be at least 0, got {most_nbytes}")
        self._write, self._most_nbytes = write, most_nbytes
        self._lock = threading.Condition()
        self._waiting: OrderedDict[tuple[BlockKey, str], Pending] = OrderedDict()
        self._current: Pending | None = None
        self._cancelled = False
        self._nbytes = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, pending: Pending) -> bool:
        """Queue a write, whose pin is released here from now on; False if there is no room."""
        with self._lock:
            if self._closed or self._nbytes + pending.nbytes > self._most_nbytes:
                return False
            self._waiting[pending.key, pending.target.name] = pending
            self._nbytes += pending.nbytes
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="kvrag-write-back", daemon=True
                )
                self._thread.start()
            self._lock.notify_all()
            return True

    def discard(self, key: BlockKey) -> None:
        """The block is deleted or replaced: what is owed of it is not written any more.

        Call it with the key's lock held, which a write takes before it asks `is_owed`.
        """
        with self._lock:
            for place in [place for place in self._waiting if place[0] == key]:
                self._release_locked(self._waiting.pop(place))
            if self._current is not None and self._current.key == key:
                self._cancelled = True

    def is_owed(self) -> bool:
        """Whether the write that has begun is still wanted; for `write` to ask."""
        with self._lock:
            return not self._cancelled

    def waiting(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of the blocks that are owed to each slot, by its name."""
        blocks: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        with self._lock:
            for pending in self._waiting.values():
                blocks[pending.target.name] += 1
                nbytes[pending.target.name] += pending.nbytes
            if self._current is not None:
                blocks[self._current.target.name] += 1
                nbytes[self._current.target.name] += self._current.nbytes
        return {name: (count, nbytes[name]) for name, count in blocks.items()}

    def flush(self) -> None:
        """Return when nothing waits."""
        with self._lock:
            self._lock.wait_for(lambda: not self._waiting and self._current is None)

    def close(self) -> None:
        """Write what waits, and end the thread. A second call does nothing."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                _, pending = self._waiting.popitem(last=False)
                self._current, self._cancelled = pending, False
            try:
                self._write(pending)
            except Exception:
                # The block stays where it is, as after a write through that failed.
                pending.target.count(errors=1)
                _log.exception("block %s is not written back", pending.key)
            finally:
                with self._lock:
                    self._current = None
                    self._release_locked(pending)
                    self._lock.notify_all()

    def _release_locked(self, pending: Pending) -> None:
        self._nbytes -= pending.nbytes
        pending.source.ledger.unpin(pending.receipt)
