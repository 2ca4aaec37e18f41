"""One chunk of a stream: which of its layers to read next, and those that are there.

Layers wait as they are stored if they are placed from that: the codes of `int4` take a quarter of
the memory, and their numbers none.

Groups of layers grow, 1, 2, 4, …: nothing hides the first layer's loading, so it comes alone, and
later ones hide behind computing, where fewer and larger reads are cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvrag.kernels.native import StoredKV, StoredSegment
from kvrag.store.codecs import Codec
from kvrag.store.header import BlockHeader
from kvrag.store.tiered import BlockReader

__all__ = ["ChunkReads", "LayerKV", "stored_kv"]

#: Un-rotated K and V of one chunk in one layer: (kv_heads, tokens, head_dim) each.
LayerKV = tuple[Tensor, Tensor]


def stored_kv(codec: Codec, header: BlockHeader) -> StoredKV | None:
    """For a block's segments as they are stored; None if native code cannot place from those."""
    layout = codec.layout(header)
    return None if layout is None or not StoredKV.takes(layout) else StoredKV(layout)


class ChunkReads:
    """Not thread-safe but for `unpacked`. One group of layers is read at a time.

    Args:
        wanted: the layers to read, ascending.
        placing: whether layers are to wait as they are stored, where native code can place them.
    """

    def __init__(
        self, reader: BlockReader, codec: Codec, wanted: Sequence[int], *, placing: bool
    ) -> None:
        self.reader = reader
        #: The layers that are there as they are stored, verified; None if all are decoded.
        self.stored = stored_kv(codec, reader.header) if placing else None
        self._codec = codec
        #: A layer could not be read; those that are ready are sound.
        self.failed = False
        self._wanted, self._at = wanted, 0
        self._reading = False
        self._ready: dict[int, LayerKV] = {}

    @property
    def layer_nbytes(self) -> int:
        """Most bytes of a layer that waits."""
        header = self.reader.header
        if self.stored is not None:
            return max(segment.padded_nbytes for segment in header.segments)
        itemsize: int = getattr(torch, header.dtype).itemsize
        return itemsize * (math.prod(header.k_shape[1:]) + math.prod(header.v_shape[1:]))

    @property
    def begun(self) -> bool:
        """Whether layer 0, which computing waits for, is there, cannot be had or is not wanted."""
        return self._at > 0 or self.failed or self._wanted[:1] != [0]

    @property
    def ended(self) -> bool:
        """Whether nothing more will be read."""
        return self.failed or self._at == len(self._wanted)

    def next_group(self, end: int, largest: int) -> tuple[int, int] | None:
        """First and last (exclusive) layer of the next read, which is then under way.

        None while one is under way, behind the last layer, after a failure, and while the group
        would reach beyond layer `end`: it waits until it fits, for a smaller one would stay small.
        """
        if self._reading or self.ended:
            return None
        first = self._wanted[self._at]
        size = min(self._at + 1, largest, len(self._wanted) - self._at)
        while self._wanted[self._at + size - 1] != first + size - 1:
            size -= 1
        if first + size > end:
            return None
        self._reading = True
        return first, first + size

    def unpacked(
        self, first: int, segments: Sequence[memoryview]
    ) -> Sequence[LayerKV | memoryview]:
        """What to deliver of verified segments from layer `first` on. Raises `BlockFormatError`."""
        if self.stored is not None:
            return segments
        return [self.decoded(layer, segment) for layer, segment in enumerate(segments, first)]

    def decoded(self, layer: int, segment: memoryview) -> LayerKV:
        """K and V of a verified segment. Raises `BlockFormatError`."""
        header = self.reader.header
        return self._codec.decode(segment[: header.segments[layer].length], header)

    def deliver(self, first: int, layers: Sequence[LayerKV | memoryview]) -> None:
        """The group that was under way is there."""
        for layer, kv in enumerate(layers, start=first):
            if not isinstance(kv, memoryview):
                self._ready[layer] = kv
            elif self.stored is not None:
                length = self.reader.header.segments[layer].length
                self.stored.hold(layer, kv, [StoredSegment(0, len(kv), length, None)])
        self._at += len(layers)
        self._reading = False

    def fail(self) -> None:
        """The group that was under way cannot be read, or no other one is wanted."""
        self.failed = True
        self._reading = False

    def has(self, layer: int) -> bool:
        return layer in self._ready or (self.stored is not None and layer in self.stored)

    def take(self, layer: int) -> LayerKV:
        """K and V of a layer that is there decoded, handed over."""
        return self._ready.pop(layer)

    def drop(self) -> None:
        """Let go of what is there. Who has `stored` in hand may still use it."""
        self._ready.clear()
        self.stored = None
