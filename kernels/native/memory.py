"""Memory in huge pages, where the operating system offers them on request."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty_huge"]

_HUGE_PAGE_NBYTES = 2 << 20
_MADV_HUGEPAGE = 14  # Linux


def empty_huge(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor on the CPU, in huge pages as far as they are to be had.

    Memory of this size comes from the operating system page by page as it is first written: pages
    of 2 MiB take a fourth of the time of small ones, and large reads are a fifth faster. The tensor
    takes up to one such page more than its size, so this is for large ones.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    memory = torch.empty(nbytes + _HUGE_PAGE_NBYTES, dtype=torch.uint8)
    skipped = -memory.data_ptr() % _HUGE_PAGE_NBYTES
    whole = nbytes // _HUGE_PAGE_NBYTES * _HUGE_PAGE_NBYTES
    if sys.platform == "linux" and whole:
        # Only advice: kernels without huge pages refuse it, and the memory is as good.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(memory.data_ptr() + skipped), ctypes.c_size_t(whole), _MADV_HUGEPAGE
        )
    return memory[skipped : skipped + nbytes].view(dtype).view(*shape)
