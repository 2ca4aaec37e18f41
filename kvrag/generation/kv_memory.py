"""Memory of finished requests' KV caches, kept for the next ones.

Fresh memory comes from the operating system page by page and filled with zeros, which costs a
request of 4,096 tokens as much as writing all of its K and V does.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from kvrag.kernels.native import empty_huge

__all__ = ["KVMemory"]

#: 11,000 positions of a model with 30 layers of 3 KV heads of 64 in float32.
LIMIT_BYTES = 512 * 2**20


class KVMemory:
    """Hands out uninitialised tensors on the CPU and takes their memory back. Thread-safe.

    Memory comes back when the last tensor that shares it is gone, so that nobody sees what another
    writes. It is not cleared: it holds what an earlier request, perhaps of another tenant, wrote,
    as memory from an allocator may. Whoever takes it must not read what it has not written.

    Args:
        limit_bytes: most bytes of idle memory. The largest pieces stay; 0 keeps none.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes must be 0 or more, got {limit_bytes}")
        self._limit = limit_bytes
        # Memory may come back in the middle of any line here, in this thread, when Python collects
        # garbage: so the lock is reentrant and the tuple is replaced, never changed. At worst a
        # piece that came back meanwhile is not kept.
        self._lock = threading.RLock()
        self._idle: tuple[Tensor, ...] = ()

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for those who ask next."""
        return sum(piece.nbytes for piece in self._idle)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of undefined content, in huge pages as far as there are any."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(*shape, dtype=dtype)
        piece = self._taken(nbytes)
        if piece is None:
            piece = empty_huge((nbytes,), torch.uint8)
        # The tensor keeps `lent` alive, and nothing else does.
        lent = (ctypes.c_char * nbytes).from_address(piece.data_ptr())
        weakref.finalize(lent, self._back, piece).atexit = False
        return torch.frombuffer(lent, dtype=dtype).view(*shape)

    def close(self) -> None:
        """Free what is idle, and from now on what comes back."""
        with self._lock:
            self._limit, self._idle = 0, ()

    def _taken(self, nbytes: int) -> Tensor | None:
        """The smallest idle piece that suffices."""
        with self._lock:
            fits = [piece for piece in self._idle if piece.nbytes >= nbytes]
            if not fits:
                return None
            best = min(fits, key=lambda piece: piece.nbytes)
            self._idle = tuple(piece for piece in self._idle if piece is not best)
            return best

    def _back(self, piece: Tensor) -> None:
        with self._lock:
            kept, room = [], self._limit
            for each in sorted((*self._idle, piece), key=lambda each: -each.nbytes):
                if each.nbytes <= room:
                    kept.append(each)
                    room -= each.nbytes
            self._idle = tuple(kept)
