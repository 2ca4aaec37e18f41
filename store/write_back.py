"""Blocks on their way from memory to a slower tier: a bounded queue and one thread a tier.

What waits here lies whole in a faster tier, pinned, and is read from there when its turn comes: the
queue itself holds keys. When it is full, it takes no more, and the caller writes through. A write
that a tier's failure prevented is tried again after a pause, a few times, and waits as before. A
crash loses what waits, each block whole or not at all; `close` tries all of it first, or drops it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .keys import BlockKey
    from .ledger import Receipt
    from .slot import Slot

__all__ = ["PAUSES_S", "Pending", "WriteBack"]

_log = logging.getLogger(__name__)

#: Seconds before each further try: a minute in all, for a tier that failed is asked again after one
#: to sixty seconds.
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """One write that is owed: from the slot that the block is pinned in to another."""

    key: BlockKey
    nbytes: int
    source: Slot
    receipt: Receipt
    target: Slot


@dataclass(slots=True)
class _Owed:
    """A write that waits until `due_s`, of the monotonic clock; `tries` have failed."""

    pending: Pending
    due_s: float = 0.0
    tries: int = 0


class WriteBack:
    """See the module's text. Thread-safe.

    `write` does one write, and says whether it failed and is worth another try. It is called by one
    thread, with no lock held; the pin is released when it is done with. `pauses_s`: seconds before
    each further try. Raises `ValueError` for a bound or pause below 0.
    """

    def __init__(
        self,
        write: Callable[[Pending], bool],
        *,
        most_nbytes: int,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        if most_nbytes < 0 or min(pauses_s, default=0) < 0:
            raise ValueError(
                f"most_nbytes and pauses_s must be at least 0, got {most_nbytes} and {pauses_s}"
            )
        self._write, self._most_nbytes, self._pauses_s = write, most_nbytes, tuple(pauses_s)
        self._lock = threading.Condition()
        self._waiting: OrderedDict[BlockKey, _Owed] = OrderedDict()
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
            self._waiting[pending.key] = _Owed(pending)
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
            owed = self._waiting.pop(key, None)
            if owed is not None:
                self._release_locked(owed.pending)
                self._lock.notify_all()  # who waits for this write waits for nothing now
            if self._current is not None and self._current.key == key:
                self._cancelled = True

    def is_owed(self) -> bool:
        """Whether the write that has begun is still wanted; for `write` to ask."""
        with self._lock:
            return not self._cancelled

    def waiting(self) -> tuple[int, int]:
        """Number and bytes of the blocks that wait, the one that is being written included."""
        with self._lock:
            return len(self._waiting) + (self._current is not None), self._nbytes

    def settle(self, key: BlockKey) -> None:
        """Return when no write of the block waits but for another try, or is under way."""

        def is_settled() -> bool:
            owed = self._waiting.get(key)
            under_way = self._current is not None and self._current.key == key
            return not under_way and (owed is None or owed.tries > 0)

        with self._lock:
            self._lock.wait_for(is_settled)

    def flush(self) -> None:
        """Return when nothing waits but for another try."""
        with self._lock:
            self._lock.wait_for(
                lambda: (
                    self._current is None
                    and not any(not owed.tries for owed in self._waiting.values())
                )
            )

    def close(self, *, drop: bool = False) -> None:
        """Try each write that waits, once, and end the thread. A second call does nothing.

        `drop`: write nothing more, and do not wait for the write that is under way.
        """
        with self._lock:
            self._closed = True
            if drop:
                self._cancelled = True
                while self._waiting:
                    self._release_locked(self._waiting.popitem()[1].pending)
            self._lock.notify_all()
            thread = self._thread
        if thread is not None and not drop:
            thread.join()

    def _run(self) -> None:
        while (owed := self._next()) is not None:
            pending, again = owed.pending, False
            try:
                again = self._write(pending)
            except Exception:
                # The block stays where it is, as after a write through that failed.
                pending.target.count(errors=1)
                _log.exception("block %s is not written back", pending.key)
            with self._lock:
                self._current = None
                if not (again and self._retry_locked(owed)):
                    self._release_locked(pending)
                self._lock.notify_all()

    def _next(self) -> _Owed | None:
        """The first write that is due, which is then under way; None at the end. Waits for it."""
        with self._lock:
            while True:
                now_s = time.monotonic()
                for place, owed in self._waiting.items():
                    if self._closed or owed.due_s <= now_s:
                        del self._waiting[place]
                        self._current, self._cancelled = owed.pending, False
                        return owed
                if self._closed:
                    return None
                soonest_s = min((owed.due_s for owed in self._waiting.values()), default=None)
                self._lock.wait(None if soonest_s is None else soonest_s - now_s)

    def _retry_locked(self, owed: _Owed) -> bool:
        """Let a write that failed wait for another try; False if it has had its last."""
        pending = owed.pending
        if self._cancelled:
            return False
        if self._closed or owed.tries == len(self._pauses_s):
            _log.warning(
                "block %s is not written back to tier %s, which failed %d times",
                pending.key,
                pending.target.name,
                owed.tries + 1,
            )
            return False
        owed.due_s = time.monotonic() + self._pauses_s[owed.tries]
        owed.tries += 1
        self._waiting[pending.key] = owed
        return True

    def _release_locked(self, pending: Pending) -> None:
        self._nbytes -= pending.nbytes
        pending.source.ledger.unpin(pending.receipt)
