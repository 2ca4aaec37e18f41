"""Threads that read for all requests of a process: a few for each tier, none when nobody reads.

A tier has threads of its own, so that one that hangs holds up no other. It knows work and names of
tiers, nothing of layers and blocks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache

__all__ = ["WIDTH", "IoThreads", "io_threads"]

_log = logging.getLogger(__name__)

#: Threads a tier, which is the number of its reads in flight. One read leaves a disk idle while it
#: is verified and decoded; more than four were no faster (docs/benchmarks.md).
WIDTH = 4


class IoThreads:
    """Runs work in a few threads a tier, first come, first served. Thread-safe.

    Threads start when there is work, and end when there is neither work nor anybody who `joined`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane] = {}
        self._users = 0

    def join(self) -> None:
        """Keep the threads, once they are started, until `leave`."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """Undo `join`. Work submitted before is still done."""
        with self._lock:
            self._users -= 1
            if not self._users:
                for lane in self._lanes.values():
                    lane.wanted.notify_all()

    def submit(self, tier: str, work: Sequence[Callable[[], None]], *, width: int = WIDTH) -> None:
        """Run each `work`, which must not raise, in one of at most `width` threads of the tier.

        Raises:
            RuntimeError: the system gives no thread to a tier that has none; nothing will be done.
        """
        with self._lock:
            lane = self._lanes.setdefault(tier, _Lane(self._lock))
            lane.work.extend(work)
            lane.wanted.notify(len(work))
        try:
            self._grow(lane, width)
        except RuntimeError:
            with self._lock:
                if lane.threads:
                    return  # they will come to it
                for mine in work:
                    with contextlib.suppress(ValueError):
                        lane.work.remove(mine)
                # Others counted on the thread that did not come.
                orphans = list(lane.work)
                lane.work.clear()
            for orphan in orphans:
                orphan()
            raise

    def _grow(self, lane: _Lane, width: int) -> None:
        """Start one thread more if there is more work than idle threads and room for one."""
        with self._lock:
            if len(lane.work) <= lane.idle or lane.threads >= width:
                return
            lane.threads += 1
        name = f"kvrag-io-{len(self._lanes)}"
        try:
            threading.Thread(target=self._run, args=(lane, width), name=name, daemon=True).start()
        except RuntimeError:
            with self._lock:
                lane.threads -= 1
            raise

    def _run(self, lane: _Lane, width: int) -> None:
        # Each thread starts the next, so that who submits waits for one to start at most.
        with contextlib.suppress(RuntimeError):
            self._grow(lane, width)
        while (work := self._next(lane)) is not None:
            try:
                work()
            except BaseException:
                _log.exception("work in an I/O thread raised")
            del work  # or an idle thread keeps a finished request's memory

    def _next(self, lane: _Lane) -> Callable[[], None] | None:
        """Wait for work; None when it is time to end."""
        with self._lock:
            lane.idle += 1
            lane.wanted.wait_for(lambda: lane.work or not self._users)
            lane.idle -= 1
            if lane.work:
                return lane.work.popleft()
            lane.threads -= 1
            return None


class _Lane:
    """Work and threads of one tier."""

    def __init__(self, lock: threading.Lock) -> None:
        self.work: deque[Callable[[], None]] = deque()
        self.wanted = threading.Condition(lock)
        self.threads = self.idle = 0


def io_threads() -> IoThreads:
    """The threads that the requests of this process share."""
    return _of_process(os.getpid())


@cache
def _of_process(pid: int) -> IoThreads:
    """By process: a fork copies the books of threads that it does not copy."""
    return IoThreads()
