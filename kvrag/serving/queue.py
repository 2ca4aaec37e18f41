"""Requests that need the model, one after the other in order of arrival.

One thread runs them, so that the model never runs on the event loop. Routes know `submit` and
`Job` and nothing of that thread: batching replaces what is behind them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from kvrag.errors import BusyError, ClosedError, KvragError

__all__ = ["Job", "JobCancelledError", "ModelQueue"]

T = TypeVar("T")
R = TypeVar("R")


class JobCancelledError(KvragError):
    """Nobody waits for the job any more."""


@dataclass(frozen=True, slots=True)
class _Done(Generic[R]):
    result: R


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class Job(Generic[T, R]):
    """One request's work: `async for` gives what it emits, `result()` what it returns.

    Both raise what the work raised. `emit` and `cancelled` belong to the work, in its thread; the
    rest belongs to the event loop that submitted it. What is emitted waits without a limit, so that
    a slow reader never holds the model; a request emits no more than its tokens.
    """

    def __init__(
        self, work: Callable[[Job[T, R]], R], withdraw: Callable[[Job[T, R]], None]
    ) -> None:
        """Use `ModelQueue.submit`."""
        self._work, self._withdraw = work, withdraw
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[T | _Done[R] | _Failed] = asyncio.Queue()
        self._cancel = threading.Event()
        self._end: _Done[R] | _Failed | None = None

    # ---- in the thread of the work ---------------------------------------------------------------

    def cancelled(self) -> bool:
        """Whether the work should end early."""
        return self._cancel.is_set()

    def emit(self, item: T) -> None:
        """Hand `item` to whoever iterates over the job."""
        self._deliver(item)

    def run(self) -> None:
        """Do the work; never raises."""
        if self.cancelled():
            return
        try:
            self._deliver(_Done(self._work(self)))
        except BaseException as exc:  # whoever awaits the job gets it
            self._deliver(_Failed(exc))

    # ---- on the event loop -----------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._end is None:
            event = await self._events.get()
            if not isinstance(event, _Done | _Failed):
                return event
            self._end = event
        if isinstance(self._end, _Failed):
            raise self._end.error
        raise StopAsyncIteration

    async def result(self) -> R:
        """What the work returned; skips what it emitted."""
        async for _ in self:
            pass
        match self._end:
            case _Done(result):
                return result
        raise RuntimeError("a job ended without a result")  # pragma: no cover

    def cancel(self, reason: KvragError | None = None) -> None:
        """Leave the queue, or end at the next layer or token. Whoever awaits gets `reason` now."""
        if not self._cancel.is_set():
            self._cancel.set()
            self._deliver(_Failed(reason or JobCancelledError("the request was cancelled")))
            self._withdraw(self)

    def _deliver(self, event: T | _Done[R] | _Failed) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            # The loop is closed, so nobody waits.
            self._cancel.set()


class ModelQueue:
    """Runs jobs one at a time, first come, first served. Thread-safe.

    Args:
        size: jobs that may wait while one runs.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._waiting: deque[Job[Any, Any]] = deque()
        self._running: Job[Any, Any] | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Jobs in line, without the one that runs."""
        with self._changed:
            return self._waiting_locked()

    @property
    def running(self) -> int:
        """1 while a job runs, else 0."""
        with self._changed:
            return int(self._running is not None or bool(self._waiting))

    def submit(self, work: Callable[[Job[T, R]], R]) -> Job[T, R]:
        """Put `work` in line.

        Raises:
            BusyError: `size` jobs wait.
            ClosedError: after `stop`.
        """
        job: Job[T, R] = Job(work, self._withdraw)
        with self._changed:
            if self._closed:
                raise ClosedError("the server is shutting down")
            if self._waiting_locked() >= self.size:
                raise BusyError(f"{self.size} requests wait already; try again later")
            self._waiting.append(job)
            if self._thread is None:
                # A daemon: whoever closes decides how long work that cannot be cancelled may take.
                self._thread = threading.Thread(target=self._run, name="kvrag-model", daemon=True)
                self._thread.start()
            self._changed.notify()
        return job

    def stop(self) -> None:
        """Cancel every job with `ClosedError` and take no more. Does not wait."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify()
        for job in jobs:
            job.cancel(ClosedError("the server is shutting down"))

    def close(self, timeout_s: float | None = None) -> bool:
        """`stop` and wait for the running job; whether it ended in time. May be called again."""
        self.stop()
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _waiting_locked(self) -> int:
        # The thread may not have taken the first job yet, although nothing holds it up.
        return max(0, len(self._waiting) - (self._running is None))

    def _withdraw(self, job: Job[Any, Any]) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                self._running = job = self._waiting.popleft()
            job.run()
            del job  # and with it the request's tensors and texts, while the next one is awaited
