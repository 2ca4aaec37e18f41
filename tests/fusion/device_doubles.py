"""A device that copies late, and writes down all that is asked of it."""

from __future__ import annotations

from collections import deque

import torch

__all__ = ["LateCopies"]


class LateCopies:
    """A `CopyStream` on the CPU as a GPU is: a copy is done when somebody waits for it, not before.

    Until then the copy holds `FILL`, and what it reads must stay as it was. `log` has ("copy", i),
    ("record", e), ("wait", e), ("synchronize", e) in order; copy i is behind event e if it came
    before it.
    """

    FILL = 0xAB

    def __init__(self, fails_at=None):
        self.log = []
        #: What copies yielded, by their number, and how many bytes of pinned memory were asked for.
        self.copies, self.pinned = [], []
        self.fails_at = fails_at
        self._queue = deque()
        self._events = 0

    def pinned_empty(self, nbytes):
        self.pinned.append(torch.empty(nbytes, dtype=torch.uint8))
        return self.pinned[-1]

    def copy(self, source):
        number = len(self.copies)
        if number == self.fails_at:
            raise torch.OutOfMemoryError("the device is full")
        assert any(_within(source, memory) for memory in self.pinned), "copied out of other memory"
        copy = torch.full_like(source, self.FILL)
        self._queue.append((source, source.clone(), copy, self._events))
        self.copies.append(copy)
        self.log.append(("copy", number))
        return copy

    def record(self):
        event = _Event(self, self._events)
        self.log.append(("record", self._events))
        self._events += 1
        return event

    def share(self, copies):
        self.log.append(("share", len(list(copies))))

    def pass_event(self, event):
        """What a device has done by then."""
        while self._queue and self._queue[0][3] <= event:
            source, before, copy, _ = self._queue.popleft()
            assert torch.equal(source, before), "the staging was written before its copy was done"
            copy.copy_(source)

    @property
    def pending(self):
        return len(self._queue)


class _Event:
    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def wait(self):
        self.stream.log.append(("wait", self.number))
        self.stream.pass_event(self.number)

    def synchronize(self):
        self.stream.log.append(("synchronize", self.number))
        self.stream.pass_event(self.number)


def _within(tensor, memory):
    begin = memory.data_ptr()
    return begin <= tensor.data_ptr() < begin + memory.numel()
