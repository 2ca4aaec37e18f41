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
        chunks: one source a chunk: an open reader, or all layers in memory. The stream closes the
            readers.
        codec: decodes the readers' segments.
        recompute: makes all layers of chunk i anew, when its block fails on the way.

    `load_s` is how long the reader thread read, verified and decoded; `stall_s` how long the
    caller waited for it; `recompute_s` is the time in `recompute`; `failed` holds the indices of
    the chunks that were computed anew.
    """

    def __init__(
        self,
        chunks: Sequence[BlockReader | Sequence[LayerKV]],
        codec: Codec,
        recompute: Callable[[int], Sequence[LayerKV]],
        num_layers: int,
    ) -> None:
        self._readers = {i: c for i, c in enumerate(chunks) if isinstance(c, BlockReader)}
        self._memory = {i: c for i, c in enumerate(chunks) if not isinstance(c, BlockReader)}
        self._codec, self._recompute, self._num_layers = codec, recompute, num_layers
        self.load_s = self.stall_s = self.recompute_s = 0.0
        self.failed: set[int] = set()
        self._next = 0
        self._closed = threading.Event()
        self._ready: Queue[dict[int, LayerKV | StoreError] | BaseException] = Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        if self._readers:
            self._thread = threading.Thread(target=self._read, name="kvrag-layers", daemon=True)
            self._thread.start()

    def next_layer(self) -> list[LayerKV]:
        index, self._next = self._next, self._next + 1
        if self._closed.is_set() or index >= self._num_layers:
            raise RuntimeError(f"layer {index} asked of a stream that is closed or at its end")
        loaded: dict[int, LayerKV | StoreError] = {}
        if self._thread is not None:
            begun = time.perf_counter()
            item = self._ready.get()
            self.stall_s += time.perf_counter() - begun
            if isinstance(item, BaseException):
                raise item
            loaded = item
        for chunk, kv in loaded.items():
            if isinstance(kv, StoreError) and chunk not in self._memory:
                begun = time.perf_counter()
                self._memory[chunk] = self._recompute(chunk)
                self.recompute_s += time.perf_counter() - begun
                self.failed.add(chunk)
        count = len(self._readers.keys() | self._memory.keys())
        return [self._kv(chunk, index, loaded) for chunk in range(count)]

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
            for index in range(self._num_layers):
                begun = time.perf_counter()
                layer: dict[int, LayerKV | StoreError] = {}
                for chunk, reader in self._readers.items():
                    if self._closed.is_set():
                        return
                    if chunk in self.failed:
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
