"""Stages of a job that work at the same time: each in a thread, a bounded number of items ahead.

    with Stages() as stages:
        documents = stages.ahead(load(paths), room=4)
        chunked = stages.ahead(map(chunk, documents), room=4)

A stage is an iterator over the one before, so it need not know that there are threads. What one
raises comes out where its items are taken; leaving the block stops them all.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

__all__ = ["Stages"]

T = TypeVar("T")

#: Seconds between two looks whether a stage that waits was stopped.
_ASK_S = 0.05


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


class Stages:
    """The threads of one job. Its iterators are for one thread each."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def ahead(self, items: Iterable[T], *, room: int) -> Iterator[T]:
        """`items`, taken in a thread of their own, at most `room` of them before they are wanted.

        Ends early, without an error, where the job is stopped.
        """
        passed: queue.Queue[Any] = queue.Queue(room)
        thread = threading.Thread(
            target=self._fill, args=(items, passed), name="kvrag-stage", daemon=True
        )
        self._threads.append(thread)
        thread.start()
        return self._drained(passed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop and wait: a stage ends its item, which a loader that hangs may not do for long."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _fill(self, items: Iterable[Any], passed: queue.Queue[Any]) -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not self._put(passed, item):
                    return
        except BaseException as exc:
            error = exc
        self._put(passed, _End(error))

    def _put(self, passed: queue.Queue[Any], item: object) -> bool:
        while not self._stop.is_set():
            try:
                passed.put(item, timeout=_ASK_S)
            except queue.Full:
                continue
            return True
        return False

    def _drained(self, passed: queue.Queue[Any]) -> Iterator[Any]:
        while not self._stop.is_set():
            try:
                item = passed.get(timeout=_ASK_S)
            except queue.Empty:
                continue
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return
