"""One chunk of a stream whose block lies in memory: its layers are verified where they are used.

A thread that reads memory beside the one that computes gains nothing: for each layer of each chunk
it would take the interpreter lock from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from kvrag.fusion.stream.chunk_reads import LayerKV, stored_kv
from kvrag.kernels.native import StoredKV, StoredSegment
from kvrag.store.codecs import Codec
from kvrag.store.resident import Resident
from kvrag.store.tiered import BlockReader

__all__ = ["ResidentChunk"]


class ResidentChunk:
    """Not thread-safe. `last`: the last layer that is wanted of it.

    stored: for who verifies and places all chunks of a layer at once; None where native code cannot
    place them from where they lie, or nobody asks it to.
    """

    def __init__(
        self,
        reader: BlockReader,
        resident: Resident,
        codec: Codec,
        stored: StoredKV | None,
        last: int,
    ) -> None:
        self.reader, self.tier, self.stored, self.last = reader, resident.tier, stored, last
        self._resident, self._codec = resident, codec
        if stored is not None:
            segments = resident.header.segments
            stored.hold(
                0,
                resident.data,
                (
                    StoredSegment(*resident.place(layer), part.length, part.checksum)
                    for layer, part in enumerate(segments)
                ),
            )

    @classmethod
    def of(
        cls, reader: BlockReader, codec: Codec, wanted: Sequence[int], *, placing: bool
    ) -> Self | None:
        """None where the block lies elsewhere, or its codes are better decoded by other threads.

        wanted: layers, ascending. placing: whether they are placed as they are stored.
        """
        if not reader.in_memory:
            return None
        layout = codec.layout(reader.header)
        stored = stored_kv(codec, reader.header) if placing else None
        if stored is None and (layout is None or layout.bits):
            return None
        resident = reader.resident()
        if resident is None:
            return None
        return cls(reader, resident, codec, stored, wanted[-1])

    def count(self, layer: int) -> int:
        """Note that a layer was verified elsewhere; its bytes."""
        return self._resident.count(layer)

    def verified(self, layer: int) -> tuple[LayerKV, int]:
        """K and V of a layer, checked and decoded now, and the bytes that were read for that.

        Raises `BlockFormatError`.
        """
        nbytes, header = self._resident.verify(layer), self._resident.header
        filled = self._resident.segment(layer)[: header.segments[layer].length]
        return self._codec.decode(filled, header), nbytes

    def close(self) -> None:
        """Close the reader, too. A second call does nothing."""
        self._resident.close()
        self.reader.close()
