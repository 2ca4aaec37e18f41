"""A device that copies late, and writes down all that is asked of it."""

from __future__ import annotations

from collections import deque

import torch

__all__ = ["FILL", "LateCopies"]

#: What a copy holds before it is done.
FILL = 0xAB


class LateCopies:
    """A `CopyStream` on the CPU as a GPU is: copies are done later than they are begun.

    `log` has ("copy", i), ("record", e), ("wait", e), ("synchronize", e) and ("use", i) in order;
    `behind[i]` is the first event behind copy i.

    Args:
        lazy: copies are done when somebody uses one of them or synchronizes, as late as on a GPU
            whose computing lags. Else they are done when the computing waits, so that a strategy
            can run over them.
        fails_at: the number of a copy for which there is no memory.
    """

    def __init__(self, *, lazy=False, fails_at=None):
        self.lazy, self.fails_at = lazy, fails_at
        self.log, self.copies, self.behind, self.pinned = [], [], [], []
        self._queue = deque()
        #: The last event that the computing waits for.
        self.awaited = -1
        self._events = 0

    # ---- what a copy stream does -------------------------------------------------------------

    def pinned_empty(self, nbytes):
        self.pinned.append(torch.empty(nbytes, dtype=torch.uint8))
        return self.pinned[-1]

    def is_pinned(self, source):
        return any(_within(source, memory) for memory in self.pinned)

    def copy(self, source):
        number = len(self.copies)
        if number == self.fails_at:
            raise torch.OutOfMemoryError("the device is full")
        assert self.is_pinned(source), "not from pinned memory"
        copy = torch.full_like(source, FILL)
        # Another object: who lets a copy's source go is found out.
        self._queue.append((number, source.detach(), source.clone()))
        self.copies.append(copy)
        self.behind.append(self._events)
        self.log.append(("copy", number))
        return copy

    def record(self):
        self.log.append(("record", self._events))
        self._events += 1
        return _Event(self, self._events - 1)

    def share(self, copies):
        pass

    # ---- what the device does ----------------------------------------------------------------

    @property
    def pending(self):
        """How many copies are begun and not done."""
        return len(self._queue)

    def number_of(self, tensor):
        """The copy that `tensor` is part of, or None."""
        return next((i for i, copy in enumerate(self.copies) if _within(tensor, copy)), None)

    def use(self, tensor):
        """The computing reads part of a copy."""
        number = self.number_of(tensor)
        assert self.awaited >= self.behind[number], "used without waiting for the copy"
        self.log.append(("use", number))
        self.do(self.behind[number])

    def wait(self, event):
        self.log.append(("wait", event))
        self.awaited = max(self.awaited, event)
        if not self.lazy:
            self.do(event)

    def synchronize(self, event):
        self.log.append(("synchronize", event))
        self.do(event)

    def do(self, event):
        """All copies in front of the event."""
        while self._queue and self.behind[self._queue[0][0]] <= event:
            number, source, before = self._queue.popleft()
            assert torch.equal(source, before), "the staging was written while a copy read it"
            self.copies[number].copy_(source)


class _Event:
    def __init__(self, stream, number):
        self._stream, self._number = stream, number

    def wait(self):
        self._stream.wait(self._number)

    def synchronize(self):
        self._stream.synchronize(self._number)


def _within(tensor, memory):
    begin = memory.data_ptr()
    return begin <= tensor.data_ptr() < begin + memory.numel()
