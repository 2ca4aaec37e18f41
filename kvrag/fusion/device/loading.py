"""How stored K and V come to the device: out of its cache, or by copies that fill it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Self, TypeVar

import torch

from kvrag.fusion.base import LayerStream
from kvrag.fusion.device.cache import DeviceCache, Lease, Room
from kvrag.fusion.device.copies import DeviceCopies
from kvrag.fusion.device.copy_stream import CopyStream, copy_stream
from kvrag.fusion.stream import LayerKV
from kvrag.store.keys import BlockKey

__all__ = ["CachedLayers", "DeviceLoading", "HeldChunks"]

T = TypeVar("T")


class DeviceLoading:
    """The copy stream of one device, and its cache if it has one. Thread-safe."""

    def __init__(self, stream: CopyStream, cache: DeviceCache | None) -> None:
        self.stream, self.cache = stream, cache

    @classmethod
    def of(cls, device: torch.device, cache_bytes: int) -> Self | None:
        """With a cache of so many bytes, 0 is none; None if K and V are used where they load."""
        if device.type == "cpu" and not cache_bytes:
            return None
        return cls(copy_stream(device), DeviceCache(cache_bytes) if cache_bytes else None)


class HeldChunks:
    """Which chunks of one prompt the device holds; the others, in their order, are to load.

    Close it: until then it keeps what the device holds.

    Args:
        device: None where K and V are used where they load.
        keys: one a chunk; not looked at without a cache.
    """

    def __init__(self, device: DeviceLoading | None, keys: Iterable[BlockKey], count: int) -> None:
        self._device = device
        self._cache = None if device is None else device.cache
        self._keys: list[BlockKey] = [] if self._cache is None else list(keys)
        self._leases: list[Lease | None] = [None] * count
        if self._cache is not None:
            self._leases = [self._cache.lease(key) for key in self._keys]
        #: Indices of the chunks that the device does not hold.
        self.to_load = [i for i, lease in enumerate(self._leases) if lease is None]

    @property
    def in_place(self) -> bool:
        """Whether K and V are used where they load."""
        return self._device is None

    def first_to_load(self, first_chunks: Sequence[int]) -> list[int]:
        """`FusionStrategy.first_chunks` counted in the chunks to load."""
        return [bisect_left(self.to_load, first) for first in first_chunks]

    def spread(self, loaded: Sequence[T], held: T) -> list[T]:
        """One a chunk: `held` for those that the device holds, one of `loaded` for each other."""
        values = [held] * len(self._leases)
        for chunk, value in zip(self.to_load, loaded, strict=True):
            values[chunk] = value
        return values

    def layers(self, loading: LayerStream, first_chunks: Sequence[int]) -> LayerStream:
        """All the prompt's chunks where they are computed with.

        Args:
            loading: those to load, in memory of the CPU; closed with the result.
            first_chunks: see `FusionStrategy.first_chunks`.
        """
        if self._device is None:
            return loading
        copies = DeviceCopies(loading, self._device.stream)
        if self._cache is None:
            return copies
        return CachedLayers(
            self._cache, self._device.stream, self._keys, self._leases, copies, first_chunks
        )

    def close(self) -> None:
        """Let go of what the device holds. A second call does nothing."""
        with ExitStack() as each:  # also those behind one that fails
            for lease in self._leases:
                if lease is not None:
                    each.callback(lease.close)


class CachedLayers:
    """A `fusion.LayerStream` that joins leased chunks with loaded ones, and admits these.

    A chunk is admitted when all its layers have come, and so not where a window spares it some.
    Not thread-safe. The leases stay with the caller.

    Args:
        keys, leases: one a chunk; None for those that `copies` yields.
        copies: on the device, in memory of their own; closed with this.
        first_chunks: see `FusionStrategy.first_chunks`, over all chunks.
    """

    def __init__(
        self,
        cache: DeviceCache,
        stream: CopyStream,
        keys: Sequence[BlockKey],
        leases: Sequence[Lease | None],
        copies: LayerStream,
        first_chunks: Sequence[int],
    ) -> None:
        self._cache, self._stream = cache, stream
        self._keys, self._leases = keys, leases
        self._copies, self._first_chunks = copies, first_chunks
        self._arriving: dict[int, list[LayerKV]] = {}
        self._rooms: dict[int, Room] = {}
        self._next = 0
        for lease in leases:
            if lease is not None:
                lease.ready.wait()

    def next_layer(self) -> list[LayerKV]:
        copied = iter(self._copies.next_layer())
        index = self._next
        layer = [
            self._loaded(chunk, next(copied)) if lease is None else self._held(lease)
            for chunk, lease in enumerate(self._leases)
            if chunk >= self._first_chunks[index]
        ]
        self._next += 1
        if self._next == len(self._first_chunks):
            self._admit()
        return layer

    def close(self) -> None:
        with ExitStack() as each:
            each.callback(self._copies.close)
            for room in self._rooms.values():
                each.callback(room.close)
            self._arriving.clear()

    def _held(self, lease: Lease) -> LayerKV:
        kv = lease.layers[self._next]
        self._stream.share(kv)
        return kv

    def _loaded(self, chunk: int, kv: LayerKV) -> LayerKV:
        """`kv`, kept as well if there is room for all of the chunk."""
        if self._next == 0:
            nbytes = len(self._first_chunks) * sum(part.nbytes for part in kv)
            room = self._cache.reserve(self._keys[chunk], nbytes)
            if room is not None:
                self._rooms[chunk], self._arriving[chunk] = room, []
        if chunk in self._arriving:
            self._arriving[chunk].append(kv)
        return kv

    def _admit(self) -> None:
        ready = self._stream.record()
        for chunk, layers in self._arriving.items():
            if len(layers) == len(self._first_chunks):
                self._rooms[chunk].fill(layers, ready)
