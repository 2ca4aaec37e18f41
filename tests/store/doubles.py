"""Tiers that fail, count and wait, for tests of what composes tiers."""

from __future__ import annotations

import threading

from kvrag.store.errors import TierError, TierFullError
from kvrag.store.ram import RamTier


class FakeClock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class SlowTier(RamTier):
    """Stands for a durable, slower tier. `reads` counts segments read, `calls` all operations.

    `down`: every operation fails. `full`: every put does. `gate`: reads wait for
    it, and set `waiting`.
    """

    def __init__(self, name="slow", *, durable=True):
        super().__init__(name)
        self.durable = durable
        self.in_process = False
        self.reads = []
        self.calls = 0
        self.down = False
        self.full = False
        self.gate = None
        self.waiting = threading.Event()

    def _ask(self):
        self.calls += 1
        if self.down:
            raise TierError(self.name, "no route to it")

    def header(self, key):
        self._ask()
        return super().header(key)

    def segments(self, key, first, last):
        self._ask()
        if self.gate is not None:
            self.waiting.set()
            self.gate.wait(10)
        self.reads.append((first, last))
        return super().segments(key, first, last)

    def put(self, key, block):
        self._ask()
        if self.full:
            raise TierFullError(self.name, "no space left")
        super().put(key, block)

    def delete(self, key):
        self._ask()
        return super().delete(key)

    def contains(self, key):
        self._ask()
        return super().contains(key)

    def keys(self, tag=None):
        self._ask()
        return super().keys(tag)

    def entries(self):
        self._ask()
        return super().entries()


def in_threads(count, work):
    """Run `work(index)` in threads that start together; their results, in order."""
    results = [None] * count
    failures = []
    barrier = threading.Barrier(count)

    def run(index):
        try:
            barrier.wait(10)
            results[index] = work(index)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
