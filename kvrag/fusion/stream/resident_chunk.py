"""One chunk of a stream whose block lies in memory: its layers are verified where they are used.

A thread that reads memory beside the one that computes gains nothing: for each layer of each chunk
it would take the interpreter lock from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Self

import numpy as np
from torch import Tensor

from kvrag.fusion.stream.chunk_reads import LayerKV
from kvrag.kernels.native import StoredKV
from kvrag.store.codecs import Codec
from kvrag.store.resident import Resident
from kvrag.store.tiered import BlockReader

__all__ = ["ResidentChunk"]


class ResidentChunk:
    """Not thread-safe. `last`: the last layer that is wanted of it."""

    def __init__(
        self,
        reader: BlockReader,
        resident: Resident,
        k: Tensor,
        v: Tensor,
        last: int,
    ) -> None:
        """k, v: un-rotated, (layers, kv_heads, tokens, head_dim)."""
        self.reader, self.tier, self.last = reader, resident.tier, last
        self._resident, self._k, self._v = resident, k, v

    @classmethod
    def of(cls, reader: BlockReader, codec: Codec, wanted: Sequence[int]) -> Self | None:
        """None where the block lies elsewhere, or must be decoded. wanted: layers, ascending."""
        if not reader.in_memory:
            return None
        resident = reader.resident()
        layers = None if resident is None else codec.layers(resident.data, reader.header)
        if resident is None or layers is None:
            return None
        return cls(reader, resident, *layers, wanted[-1])

    @cached_property
    def stored(self) -> StoredKV:
        """For who verifies all chunks of a layer at once."""
        header = self._resident.header
        segments = np.frombuffer(self._resident.data, np.uint8).reshape(len(header.segments), -1)
        checksums = np.array([segment.checksum for segment in header.segments], np.uint64)
        return StoredKV(segments, self._k, self._v, header.segments[0].length, checksums)

    def count(self, layer: int) -> int:
        """Note that a layer was verified elsewhere; its bytes."""
        return self._resident.count(layer)

    def verified(self, layer: int) -> tuple[LayerKV, int]:
        """K and V of a layer, checked now, and the bytes that were read for that.

        Raises `BlockFormatError`.
        """
        nbytes = self._resident.verify(layer)
        return (self._k[layer], self._v[layer]), nbytes

    def close(self) -> None:
        """Close the reader, too. A second call does nothing."""
        self._resident.close()
        self.reader.close()
