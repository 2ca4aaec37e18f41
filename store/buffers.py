"""Memory for blocks, used again.

The system clears the memory that it gives out, page by page as it is touched, which may take longer
than reading a block from a disk (docs/benchmarks.md). So tiers keep some of what nobody looks at
any more.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import OrderedDict, deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .header import ALIGNMENT

__all__ = ["BufferPool", "aligned_buffer"]

#: What is smaller comes from memory that the process has anyway.
_SMALLEST = 2**17
#: A buffer is used again for what takes at least this part of it.
_FIT = 7 / 8
#: Of the processors that have pages larger than 4 KiB: the smallest of those.
_HUGE = 2**21
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it

_Bytes = NDArray[np.uint8]


def aligned_buffer(nbytes: int, *, huge: bool = False) -> memoryview:
    """Writable memory of `nbytes`, not cleared, starting at a multiple of 4,096.

    Aligned as segments are in a file, so that tensors and direct I/O may use it in place. `huge`:
    in pages of 2 MiB as far as the system has them, up to an eighth more than is used. A device
    fills those up to twice as fast (docs/benchmarks.md). Raises `MemoryError`.
    """
    return _memory(nbytes, huge=huge)[:nbytes].data


class BufferPool:
    """Aligned memory that comes back by itself when the last view of it is gone. Thread-safe.

    `keep_nbytes`: most bytes kept for the next one. What exceeds it goes back to the system, the
    longest unused first. `huge`: see `aligned_buffer`.
    """

    def __init__(self, keep_nbytes: int, *, huge: bool = False) -> None:
        self._keep_nbytes = keep_nbytes
        self._huge = huge
        self._lock = threading.Lock()
        #: What is kept, by the order in which it came back, and those numbers by size.
        self._free: OrderedDict[int, _Bytes] = OrderedDict()
        self._by_size: dict[int, list[int]] = {}
        self._came_back = 0
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
            whole = _memory(nbytes, huge=self._huge)
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
                    self._keep_locked(whole)
                self._trim_locked()
            finally:
                self._lock.release()

    def _keep_locked(self, whole: _Bytes) -> None:
        self._came_back += 1
        self._free[self._came_back] = whole
        self._by_size.setdefault(len(whole), []).append(self._came_back)
        self._free_nbytes += len(whole)

    def _trim_locked(self) -> None:
        while self._free_nbytes > self._keep_nbytes:
            number, whole = self._free.popitem(last=False)
            self._forget_locked(number, len(whole))

    def _fitting_locked(self, nbytes: int) -> _Bytes | None:
        """The smallest that is large enough, unless too much of it would be wasted."""
        # There are few sizes: those of a model's layers and blocks.
        size = min((size for size in self._by_size if nbytes <= size <= nbytes / _FIT), default=0)
        if not size:
            return None
        number = self._by_size[size][-1]  # used last: the likeliest to lie in the cache
        whole = self._free.pop(number)
        self._forget_locked(number, size)
        return whole

    def _forget_locked(self, number: int, size: int) -> None:
        of_size = self._by_size[size]
        of_size.remove(number)
        if not of_size:
            del self._by_size[size]
        self._free_nbytes -= size


def _memory(nbytes: int, *, huge: bool) -> _Bytes:
    """At least so many bytes."""
    if not huge or _ADVICE is None or nbytes < _FIT * _HUGE:
        small = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
        start = -_address(small) % ALIGNMENT
        return small[start : start + nbytes]
    pages = -(-nbytes // _HUGE)
    if nbytes < _FIT * pages * _HUGE:
        pages -= 1  # what is left over lies in small ones
    size = max(nbytes, pages * _HUGE)
    try:
        mapped = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as exc:
        raise MemoryError(f"{nbytes} bytes of memory are not to be had") from exc
    whole = np.frombuffer(mapped, dtype=np.uint8)
    start = -_address(whole) % _HUGE
    with contextlib.suppress(OSError):  # a system without them
        mapped.madvise(_ADVICE, start, pages * _HUGE)
    return whole[start : start + size]


def _address(array: _Bytes) -> int:
    return int(array.__array_interface__["data"][0])
