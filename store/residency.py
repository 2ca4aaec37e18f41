"""How much of a file lies in the page cache: what a read of it would not wait for.

`cachestat(2)` (Linux 6.5) only looks. A read with `RWF_NOWAIT` begins to load the page that it
misses, and `mincore(2)` answers "all" to who may not know; here, who may not know learns nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["cached_share"]

#: The same on every machine named: numbers of system calls are common to all since 2019.
_CACHESTAT, _MACHINES = 451, {"x86_64", "aarch64", "riscv64", "ppc64le", "s390x"}
#: Pages looked at, evenly spread: what a kernel keeps of a file, it keeps in long pieces.
_SAMPLES = 2

_Numbers = ctypes.c_uint64 * 2
_Counts = ctypes.c_uint64 * 5


def cached_share(descriptor: int, offset: int, nbytes: int) -> float | None:
    """The share of `nbytes` bytes (above 0) of an open file that lies in the page cache, 0 to 1.

    An estimate from two pages, in some 6 us. None where that cannot be told: another platform, a
    file system that keeps no such pages, a file of somebody else.
    """
    ask = _cachestat()
    if ask is None:
        return None
    page = mmap.PAGESIZE
    first, pages = offset // page, -(-nbytes // page)
    samples = min(_SAMPLES, pages)
    where, counts, found = _Numbers(0, page), _Counts(), 0
    for sample in range(samples):
        where[0] = page * (first + (2 * sample + 1) * pages // (2 * samples))
        if ask(_CACHESTAT, descriptor, where, counts, 0):
            return None
        found += counts[0] > 0
    return found / samples


@cache
def _cachestat() -> Callable[..., int] | None:
    """The system call, or None where there is none."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return None
    call = ctypes.CDLL(None).syscall
    call.argtypes = (ctypes.c_long, ctypes.c_int, _Numbers, _Counts, ctypes.c_uint)
    call.restype = ctypes.c_long
    return call
