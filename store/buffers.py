"""Memory for blocks."""

from __future__ import annotations

import numpy as np

from .header import ALIGNMENT

__all__ = ["aligned_buffer"]


def aligned_buffer(nbytes: int) -> memoryview:
    """Writable memory of `nbytes`, not cleared, starting at a multiple of 4,096.

    Aligned as segments are in a file, so that tensors and direct I/O may use it in place.
    """
    whole = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole.data[start : start + nbytes]
