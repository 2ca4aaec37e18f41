"""Memory for blocks, used again.

The system clears the memory that it gives out, page by page as it is touched, which may take longer
than reading a block from a disk (docs/benchmarks.md). So tiers keep some of what nobody looks at
any more.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .header import ALIGNMENT

__all__ = ["BufferPool", "aligned_buffer"]

#: What is smaller comes from memory that the process has anyway.
_SMALLEST = 2**17
#: A buffer is used again for what takes at least this part of it.
_FIT = 7 / 8

_Bytes = NDArray[np.uint8]


def aligned_buffer(nbytes: int) -> memoryview:
    """Writable memory of `nbytes`, not cleared, starting at a multiple of 4,096.

    Aligned as segments are in a file, so that tensors and direct I/O may use it in place.
    """
    return _aligned(nbytes).data


class BufferPool:
    """Aligned memory that comes back by itself when the last view of it is gone. Thread-safe.

    `keep_nbytes`: most bytes kept for the next one. What exceeds it goes back to the system, the
    longest unused first.
    """

    def __init__(self, keep_nbytes: int) -> None:
        self._keep_nbytes = keep_nbytes
        self._lock = threading.Lock()
        self._free: list[_Bytes] = []  # the longest unused first
        self._free_nbytes = 0
        #: What watches its views, and the memory, by the watcher's id: arrays have no hash.
        self._lent: dict[int, tuple[weakref.ref[Any], _Bytes]] = {}
        self._returned: deque[int] = deque()

    def take(self, nbytes: int) -> memoryview:
        """As `aligned_buffer`: memory that no view is left of, other than the one returned."""
        if nbytes < _SMALLEST:
            return aligned_buffer(nbytes)
        with self._lock:
            whole = self._fitting_locked(nbytes)
        if whole is None:
            whole = _aligned(nbytes)
        # Views of this array hold it, and nobody else does: it ends when they do.
        lent = whole[:nbytes]
        watcher = weakref.ref(lent, self._return)
        with self._lock:
            self._lent[id(watcher)] = watcher, whole
        self._collect()
        return lent.data

    @property
    def kept_nbytes(self) -> int:
        """Bytes that wait to be used again."""
        with self._lock:
            return self._free_nbytes

    def clear(self) -> None:
        """Give back to the system what is not in use, now and whenever it comes back."""
        with self._lock:
            self._keep_nbytes = 0
            self._trim_locked()
        self._collect()

    def _return(self, watcher: weakref.ref[Any]) -> None:
        self._returned.append(id(watcher))
        self._collect()

    def _collect(self) -> None:
        """Note what has come back.

        A view may end at any instant, also in a thread that holds the lock. So nobody waits here:
        who holds it comes here afterwards.
        """
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    _, whole = self._lent.pop(self._returned.popleft())
                    self._free.append(whole)
                    self._free_nbytes += len(whole)
                self._trim_locked()
            finally:
                self._lock.release()

    def _trim_locked(self) -> None:
        while self._free_nbytes > self._keep_nbytes:
            self._free_nbytes -= len(self._free.pop(0))

    def _fitting_locked(self, nbytes: int) -> _Bytes | None:
        """The smallest that is large enough, unless too much of it would be wasted."""
        fitting = [
            (len(whole), place)
            for place, whole in enumerate(self._free)
            if nbytes <= len(whole) <= nbytes / _FIT
        ]
        if not fitting:
            return None
        whole = self._free.pop(min(fitting)[1])
        self._free_nbytes -= len(whole)
        return whole


def _aligned(nbytes: int) -> _Bytes:
    whole = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + nbytes]
