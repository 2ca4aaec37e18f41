"""One chunk of a stream: which of its layers to read next, and those that are there.

Groups of layers grow, 1, 2, 4, …: nothing hides the first layer's loading, so it comes alone, and
later ones hide behind computing, where fewer and larger reads are cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvrag.store.tiered import BlockReader

__all__ = ["ChunkReads", "LayerKV"]

#: Un-rotated K and V of one chunk in one layer: (kv_heads, tokens, head_dim) each.
LayerKV = tuple[Tensor, Tensor]


class ChunkReads:
    """Not thread-safe. `wanted`: the layers to read, ascending. One group is read at a time."""

    def __init__(self, reader: BlockReader, wanted: Sequence[int]) -> None:
        self.reader = reader
        #: A layer could not be read; those that are ready are sound.
        self.failed = False
        self._wanted, self._at = wanted, 0
        self._reading = False
        self._ready: dict[int, LayerKV] = {}

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

    def deliver(self, first: int, layers: Sequence[LayerKV]) -> None:
        """The group that was under way is there."""
        self._ready.update(enumerate(layers, start=first))
        self._at += len(layers)
        self._reading = False

    def fail(self) -> None:
        """The group that was under way cannot be read."""
        self.failed = True
        self._reading = False

    def has(self, layer: int) -> bool:
        return layer in self._ready

    def take(self, layer: int) -> LayerKV:
        """K and V of a layer that is ready, handed over."""
        return self._ready.pop(layer)

    def drop(self) -> None:
        """Let go of what is ready."""
        self._ready.clear()
