"""Segments of a store as they lie in memory: checked, decoded, rotated and placed in one call.

From Python, each chunk of each layer costs as much again as its bytes take to check; what was just
checked is still in the cache when it is placed; and decoded numbers never lie in memory.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .chunks import KINDS, checked_places
from .operations import Native, threads_for

__all__ = ["SegmentLayout", "StoredKV", "StoredSegment", "put_stored"]

#: Shorter inputs have another XXH3.
_LEAST_NBYTES = 241
#: stored_t in rotate.c.
_ROW = struct.Struct("=3qQ6q")


class SegmentLayout(Protocol):
    """How K and V of one layer lie in a segment, at its beginning.

    dtype: of the numbers, for codes when they are decoded. shape: (kv_heads, tokens, head_dim), of
    K and of V. bits: 0 for numbers in C order, K then V; 4 or 8 for codes as docs/codecs.md has
    them, with `groups` of tokens that share K's scales and `parts` of a row of V.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def bits(self) -> int: ...

    @property
    def groups(self) -> int: ...

    @property
    def parts(self) -> int: ...


class StoredSegment(NamedTuple):
    """A segment of `nbytes` from `start` on, of which `length` are filled and zeros follow.

    checksum: the XXH3-64 of all, to be compared; None where that was done.
    """

    start: int
    nbytes: int
    length: int
    checksum: int | None


class StoredKV:
    """One chunk's segments, by layer, which need not be sound. Keeps their memory. Not thread-safe.

    Raises:
        ValueError: native code does not take this layout; see `takes`.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        if not self.takes(layout):
            raise ValueError(f"cannot place K and V from {layout}")
        self.shape = layout.shape
        self._layout = (
            KINDS[layout.dtype], layout.shape[1], layout.bits, layout.groups, layout.parts
        )  # fmt: skip
        self._held: dict[int, tuple[bytes, memoryview]] = {}

    @staticmethod
    def takes(layout: SegmentLayout) -> bool:
        """Whether native code can place K and V from segments of this layout."""
        _, tokens, dim = layout.shape
        if layout.dtype not in KINDS or min(layout.shape) < 0 or not dim:
            return False
        if not layout.bits:
            return True
        # Codes are decoded to what codecs keep.
        fits = layout.bits in (4, 8) and layout.dtype is not torch.float16
        fits = fits and layout.parts > 0 and dim % layout.parts == 0
        return fits and (0 < layout.groups <= tokens or layout.groups == tokens == 0)

    def hold(self, first: int, memory: memoryview, segments: Iterable[StoredSegment]) -> None:
        """Have the segments of layers `first`, `first + 1`, … , which lie in `memory`, bytes.

        Raises:
            ValueError: one lies elsewhere, or has fewer than 241 bytes and is still to be compared.
        """
        base = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
        total = len(memory)
        for layer, (start, nbytes, length, checksum) in enumerate(segments, start=first):
            fits = 0 <= start <= start + nbytes <= total and 0 <= length <= nbytes
            verified = checksum is None
            if not fits or (nbytes < _LEAST_NBYTES and not verified):
                raise ValueError(
                    f"a segment has {nbytes} bytes, {length} of them filled, from {start} on in "
                    f"{total}; it needs {_LEAST_NBYTES} at least to be compared"
                )
            row = _ROW.pack(base + start, nbytes, length, checksum or 0, verified, *self._layout)
            self._held[layer] = row, memory[start : start + nbytes]

    def __contains__(self, layer: int) -> bool:
        return layer in self._held

    def row(self, layer: int) -> bytes:
        """A layer as `put_stored` passes it on, valid while it is held."""
        return self._held[layer][0]

    def release(self, layer: int) -> memoryview:
        """The segment of a layer as it lies in memory, which is no longer held here."""
        return self._held.pop(layer)[1]


def put_stored(
    native: Native,
    layer: int,
    chunks: Sequence[tuple[StoredKV, int]],
    tables: tuple[Tensor, Tensor] | None,
    into_k: Tensor,
    into_v: Tensor,
) -> list[int]:
    """Check a layer of chunks, and write K, rotated, and V of the sound ones; which are not sound.

    A segment is sound if its checksum and the zeros behind it fit, unless that was found before,
    and if it is as long as its layout makes it. Nothing is written of one that is not.

    Args:
        chunks: each with the position of its first token.
        tables, into_k, into_v: see `put_chunks`.

    Returns:
        Places in `chunks`, ascending.

    Raises:
        ValueError: something does not fit together; nothing has been written then.
    """
    heads, _, dim = into_k.shape
    reach, turns = checked_places(tables, into_k, into_v)
    numbers = 0
    for stored, start in chunks:
        kv_heads, tokens, head_dim = stored.shape
        if layer not in stored or kv_heads != heads or head_dim != dim:
            raise ValueError(
                f"layer {layer} of k {stored.shape} does not fit into {tuple(into_k.shape)}"
            )
        if start < 0 or start + tokens > reach:
            raise ValueError(
                f"positions {start} .. {start + tokens - 1} are not within 0 .. {reach - 1}"
            )
        numbers += tokens
    if not chunks:
        return []
    rows = b"".join([stored.row(layer) for stored, _ in chunks])
    starts = array("q", [start for _, start in chunks])
    sound = array("B", bytes(len(chunks)))
    out = (into_k.data_ptr(), *into_k.stride()[:2], into_v.data_ptr(), *into_v.stride()[:2])
    native.library.put_stored(
        rows, starts.buffer_info()[0], len(chunks), heads, dim, *turns, *out,
        sound.buffer_info()[0], threads_for(2 * heads * dim * numbers),
    )  # fmt: skip
    return [] if all(sound) else [place for place, good in enumerate(sound) if not good]
