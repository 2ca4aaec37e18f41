"""K and V that lie in memory as they were stored: checked and placed in one call for a layer.

From Python, each chunk of each layer costs as much again as its bytes take to check; and what was
just checked is still in the cache when it is placed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .chunks import KINDS, checked_places
from .operations import Native, threads_for

__all__ = ["StoredChunks", "StoredKV"]

#: Shorter inputs have another XXH3.
_LEAST_NBYTES = 241
#: Columns of a row of numbers, see stored_t in rotate.c: what moves on from layer to layer, and the
#: checksum.
_ADDRESSES, _CHECKSUM = (0, 7, 10), 3


class StoredKV(NamedTuple):
    """One chunk's segments, one a layer, which need not be sound.

    segments: uint8 (layers, nbytes), contiguous. k, v: (layers, kv_heads, n, head_dim), float32,
    bfloat16 or float16, in the first `length` bytes of each segment; zeros follow. checksums:
    uint64 (layers,), the XXH3-64 of each segment.
    """

    segments: np.ndarray
    k: Tensor
    v: Tensor
    length: int
    checksums: np.ndarray


class StoredChunks:
    """The chunks of one prompt; not thread-safe.

    Args:
        chunks: by their numbers, each with the position of its first token.

    Raises:
        ValueError: K or V lie elsewhere than in their segments, or shapes or dtypes do not fit.
    """

    def __init__(self, native: Native, chunks: Mapping[int, tuple[StoredKV, int]]) -> None:
        self._native = native
        self._kept = dict(chunks)  # and the memory with them
        self._row = {number: row for row, number in enumerate(chunks)}
        rows = [_numbers(stored, start) for stored, start in chunks.values()]
        self._numbers = np.array(rows, dtype=np.int64).reshape(len(rows), 13)
        self._checksums = np.array([stored.checksums for stored, _ in chunks.values()], np.uint64)
        self._apart = np.zeros_like(self._numbers)
        self._apart[:, _ADDRESSES] = self._numbers[:, 1:2]
        self._ends = {
            number: start + stored.k.shape[2] for number, (stored, start) in chunks.items()
        }

    @property
    def end(self) -> int:
        """One behind the last position of all chunks."""
        return max(self._ends.values(), default=0)

    def __contains__(self, number: int) -> bool:
        return number in self._row

    def put(
        self,
        layer: int,
        numbers: list[int],
        tables: tuple[Tensor, Tensor] | None,
        into_k: Tensor,
        into_v: Tensor,
    ) -> list[int]:
        """Check a layer of these chunks, and write K, rotated, and V of the sound; the others.

        Args:
            tables, into_k, into_v: see `put_chunks`.

        Raises:
            ValueError: something does not fit together; nothing has been written then.
        """
        reach, turns = checked_places(tables, into_k, into_v)
        heads, _, dim = into_k.shape
        for number in numbers:
            shape = self._kept[number][0].k.shape
            if not 0 <= layer < shape[0] or (shape[1], shape[3]) != (heads, dim):
                raise ValueError(
                    f"layer {layer} of k {tuple(shape)} does not fit into {tuple(into_k.shape)}"
                )
            if self._ends[number] > reach:
                raise ValueError(f"positions up to {self._ends[number] - 1} exceed {reach - 1}")
        if not numbers:
            return []
        rows = [self._row[number] for number in numbers]
        table = self._numbers[rows] + layer * self._apart[rows]
        table[:, _CHECKSUM] = self._checksums[rows, layer].view(np.int64)
        sound = np.zeros(len(rows), np.uint8)
        self._native.library.put_stored(
            table.ctypes.data, len(rows), heads, dim, *turns,
            into_k.data_ptr(), *into_k.stride()[:2], into_v.data_ptr(), *into_v.stride()[:2],
            sound.ctypes.data, threads_for(int(table[:, 1].sum())),
        )  # fmt: skip
        return [number for number, good in zip(numbers, sound.tolist(), strict=True) if not good]


def _numbers(stored: StoredKV, start: int) -> list[int]:
    """A row as stored_t has it, for layer 0."""
    segments, k, v = stored.segments, stored.k, stored.v
    if segments.dtype != np.uint8 or segments.ndim != 2 or not segments.flags.c_contiguous:
        raise ValueError(f"segments are {segments.dtype} {segments.shape}, not uint8 (layers, n)")
    layers, nbytes = segments.shape
    if not nbytes >= _LEAST_NBYTES or not 0 <= stored.length <= nbytes:
        raise ValueError(
            f"segments have {nbytes} bytes, {stored.length} of them filled; they need "
            f"{_LEAST_NBYTES} at least"
        )
    if stored.checksums.dtype != np.uint64 or stored.checksums.shape != (layers,):
        raise ValueError(f"there are checksums {stored.checksums.shape} for {layers} segments")
    if k.dtype not in KINDS or v.dtype != k.dtype or k.shape != v.shape or k.ndim != 4:
        raise ValueError(
            f"k {k.dtype} {tuple(k.shape)} and v {v.dtype} {tuple(v.shape)} must be alike, "
            "(layers, kv_heads, n, head_dim), in a dtype that can be placed"
        )
    first = segments.ctypes.data
    for name, part in (("k", k), ("v", v)):
        begin, size = part.data_ptr() - first, part[0].numel() * part.element_size()
        fits = part.is_cpu and part.shape[0] == layers and part[0].is_contiguous()
        fits = fits and part.stride(0) * part.element_size() == nbytes
        if not fits or begin < 0 or begin + size > stored.length:
            raise ValueError(f"{name} does not lie in its segments")
    if start < 0:
        raise ValueError(f"a chunk cannot start at {start}")
    places = [(part.data_ptr(), *part.stride()[1:3]) for part in (k, v)]
    return [first, nbytes, stored.length, 0, KINDS[k.dtype], k.shape[2], start, *places[0],
            *places[1]]  # fmt: skip
