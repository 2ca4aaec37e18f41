"""A layer stream's K and V on the device: staged in pinned memory, copied, awaited by an event.

    layer l:  copy into staging ─► begin copies on the copy stream ─► record an event
              ─► the computing waits for it ─► use

Two stagings take turns, so that layer l + 1 is staged while layer l is on its way. The thread that
asks for layers waits only if a staging's own copies, two layers ago, are still under way; the
device, which works behind, copies one layer while it computes with the one before. What lies in
pinned memory already, as the memory tier's raw blocks do beside a GPU, is copied from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from kvrag.fusion.base import LayerStream
from kvrag.fusion.device.copy_stream import CopyStream, Event
from kvrag.fusion.stream import LayerKV

__all__ = ["DeviceCopies"]

#: K and V begin at multiples of it, which every kernel's widest load can take.
_ALIGNMENT = 256


class DeviceCopies:
    """A `fusion.LayerStream` whose K and V lie on the device of `stream`, in memory of their own.

    Of each chunk and layer that was staged, K and V share one allocation. Closes `layers`, which
    yields them in memory of the CPU. Not thread-safe.
    """

    def __init__(self, layers: LayerStream, stream: CopyStream) -> None:
        self._layers, self._stream = layers, stream
        self._stagings = [_Staging(stream), _Staging(stream)]

    def next_layer(self) -> list[LayerKV]:
        chunks = self._layers.next_layer()
        if not chunks:
            return []
        staging = self._stagings[0]
        self._stagings.reverse()
        try:
            copies = [tuple(map(self._stream.copy, sources)) for sources in staging.fill(chunks)]
        finally:
            # Also of copies that another's failure leaves alone: they still read the staging.
            event = staging.read_until = self._stream.record()
        event.wait()
        self._stream.share(copy for chunk in copies for copy in chunk)
        return [
            _parts(*chunk, k, v) if len(chunk) == 1 else (chunk[0], chunk[1])
            for chunk, (k, v) in zip(copies, chunks, strict=True)
        ]

    def close(self) -> None:
        """Close the layers and release the stagings, once no copy reads them. May be repeated."""
        self._layers.close()
        for staging in self._stagings:
            staging.release()


class _Staging:
    """Pinned memory for one layer of all chunks, and what is copied without it."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._memory: Tensor | None = None
        self._sources: Sequence[LayerKV] = ()
        #: Behind it, no copy reads the memory any more.
        self.read_until: Event | None = None

    def fill(self, chunks: Sequence[LayerKV]) -> Iterator[tuple[Tensor, ...]]:
        """What to copy for each chunk, as soon as it is there.

        K and V themselves where both are pinned; else the part of the memory, uint8, that both were
        put into.
        """
        self._wait()
        self._sources = chunks
        pinned = [self._stream.is_pinned(k) and self._stream.is_pinned(v) for k, v in chunks]
        sizes = [
            0 if is_pinned else _place_of_v(k) + v.nbytes
            for (k, v), is_pinned in zip(chunks, pinned, strict=True)
        ]
        starts = [0]
        for size in sizes:
            starts.append(_aligned(starts[-1] + size))
        memory = self._memory
        if memory is None or len(memory) < starts[-1]:
            memory = self._memory = self._stream.pinned_empty(starts[-1])
        for start, size, (k, v), is_pinned in zip(starts, sizes, chunks, pinned, strict=False):
            if is_pinned:
                yield k, v
                continue
            part = memory[start : start + size]
            for into, tensor in zip(_parts(part, k, v), (k, v), strict=True):
                into.copy_(tensor)
            yield (part,)

    def release(self) -> None:
        self._wait()
        self._memory = None

    def _wait(self) -> None:
        if self.read_until is not None:
            self.read_until.synchronize()
            self.read_until = None
        self._sources = ()


def _parts(memory: Tensor, k: Tensor, v: Tensor) -> LayerKV:
    """Tensors of the shapes and dtypes of `k` and `v` over uint8 memory."""
    place = _place_of_v(k)
    return (
        memory[: k.nbytes].view(k.dtype).view(k.shape),
        memory[place : place + v.nbytes].view(v.dtype).view(v.shape),
    )


def _place_of_v(k: Tensor) -> int:
    return _aligned(k.nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
