"""A plain layer stream: one reader thread, one layer ahead of the layer that is being computed.

A chunk comes from an open block of the store or from layers in memory. A block that turns out to
be damaged on the way is computed anew, alone, by the thread that asks for the layer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, Queue

from torch import Tensor

from kvrag.store.codecs import Codec
from kvrag.store.errors import StoreError
from kvrag.store.tiered import BlockReader

__all__ = ["BlockStream", "LayerKV"]

#: Un-rotated K and V of one chunk in one layer: (kv_heads, tokens, head_dim) each.
LayerKV = tuple[Tensor, Tensor]


class BlockStream:
    """A `fusion.LayerStream` over the store.

    Args:
        readers: one a chunk, open; None for a chunk that no tier has. The stream closes them.
        codec: decodes the readers' segments.
        recompute: makes all layers of chunk i.
        first_chunks: for each layer the first chunk that is wanted, see
            `FusionStrategy.first_chunks`; those before it are not read.

    Loading begins at once. `computed` holds the indices of the chunks that were not loaded;
    `load_s` is how long the reader thread read, verified and decoded; `stall_s` how long the
    caller waited for it.
    """

    def __init__(
        self,
        readers: Sequence[BlockReader | None],
        codec: Codec,
        recompute: Callable[[int], Sequence[LayerKV]],
        first_chunks: Sequence[int],
    ) -> None:
        self._readers = {i: reader for i, reader in enumerate(readers) if reader is not None}
        self._memory: dict[int, Sequence[LayerKV]] = {}
        self._count = len(readers)
        self._codec, self._recompute, self._first_chunks = codec, recompute, first_chunks
        self.load_s = self.stall_s = 0.0
        self._error: BaseException | None = None
        self._next = 0
        self._closed = threading.Event()
        self._ready: Queue[dict[int, LayerKV | StoreError] | BaseException] = Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        if self._readers:
            self._thread = threading.Thread(target=self._read, name="kvrag-layers", daemon=True)
            self._thread.start()

    @property
    def computed(self) -> frozenset[int]:
        return frozenset(self._memory)

    @property
    def holes(self) -> list[int]:
        """Chunks that have no block and were not computed yet."""
        return [i for i in range(self._count) if i not in self._readers and i not in self._memory]

    def compute(self, chunk: int) -> None:
        """Make the layers of a chunk that cannot be loaded."""
        self._memory[chunk] = self._recompute(chunk)

    def next_layer(self) -> list[LayerKV]:
        index, self._next = self._next, self._next + 1
        if self._closed.is_set() or index >= len(self._first_chunks):
            raise RuntimeError(f"layer {index} asked of a stream that is closed or at its end")
        if self._error is not None:
            raise self._error
        loaded: dict[int, LayerKV | StoreError] = {}
        if self._thread is not None:
            begun = time.perf_counter()
            item = self._ready.get()
            self.stall_s += time.perf_counter() - begun
            if isinstance(item, BaseException):
                self._error = item
                raise item
            loaded = item
        failed = [chunk for chunk, kv in loaded.items() if isinstance(kv, StoreError)]
        for chunk in (*failed, *self.holes):
            if chunk not in self._memory:
                self.compute(chunk)
        wanted = range(self._first_chunks[index], self._count)
        return [self._kv(chunk, index, loaded) for chunk in wanted]

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            while self._thread.is_alive():
                # The thread may wait for room in the queue.
                try:
                    self._ready.get_nowait()
                except Empty:
                    self._thread.join(timeout=0.01)
            self._thread = None
        for reader in self._readers.values():
            reader.close()

    def _kv(self, chunk: int, index: int, loaded: dict[int, LayerKV | StoreError]) -> LayerKV:
        if chunk in self._memory:
            return self._memory[chunk][index]
        kv = loaded[chunk]
        if isinstance(kv, StoreError):  # all failures were turned into layers in memory
            raise kv
        return kv

    def _read(self) -> None:
        try:
            for index, first in enumerate(self._first_chunks):
                begun = time.perf_counter()
                layer: dict[int, LayerKV | StoreError] = {}
                for chunk, reader in self._readers.items():
                    if self._closed.is_set():
                        return
                    if chunk < first or chunk in self._memory:
                        continue
                    try:
                        (segment,) = reader.read(index, index + 1)
                        layer[chunk] = self._codec.decode(segment, reader.header)
                    except StoreError as exc:
                        layer[chunk] = exc
                self.load_s += time.perf_counter() - begun
                self._ready.put(layer)
        except BaseException as exc:
            # Shown where the layer is asked for: a reader that dies silently would hang the run.
            self._ready.put(exc)
