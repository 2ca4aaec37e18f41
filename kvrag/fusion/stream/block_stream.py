"""The layer stream over the store: groups of layers, several chunks at a time, a bounded way ahead.

A chunk comes from an open block of the store or from layers that were computed. Chunks are read
side by side, each from its tier, first layers first, and verified by the threads that read; those
that lie in memory are verified when their layer is asked for, by the thread that asks. Who places
layers as they are stored decodes them by that; otherwise those who verify decode. A block that
cannot be read on is computed anew, alone, by the thread that asks; the other chunks go on as they
were.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from kvrag.fusion.stream.chunk_reads import ChunkReads, LayerKV
from kvrag.fusion.stream.io_threads import WIDTH, IoThreads, io_threads
from kvrag.fusion.stream.read_times import Read, ReadTimes, TierRead
from kvrag.fusion.stream.resident_chunk import ResidentChunk
from kvrag.kernels.native import StoredKV
from kvrag.store.codecs import Codec
from kvrag.store.errors import BlockFormatError, StoreError
from kvrag.store.tiered import BlockReader

__all__ = ["BlockStream", "LoadingCancelled", "Place"]

#: Most bytes of layers that wait for a request: 20 layers in bfloat16 of 4,096 tokens of a model
#: with 3 KV heads of 64, 4 of one with 8 of 128.
AHEAD_BYTES = 64 * 2**20
#: Most layers a read. Larger groups read no faster (docs/benchmarks.md).
LARGEST_GROUP = 8
#: Seconds between two looks whether a request that waits for a tier was cancelled.
_ASK_S = 0.1


#: Writes a layer of chunks, given by their numbers, where they belong; those that are damaged.
Place = Callable[[Mapping[int, StoredKV]], list[int]]


class LoadingCancelled(Exception):
    """The request was cancelled while it waited for a layer."""


class BlockStream:
    """A `fusion.LayerStream` over the store. One thread asks for layers; any may close it.

    Args:
        readers: one a chunk, open; None for a chunk that no tier has. The stream closes each as
            soon as it has read what is wanted of it.
        codec: decodes the readers' segments.
        recompute: makes all layers of chunk i.
        first_chunks: for each layer the first chunk that is wanted, see
            `FusionStrategy.first_chunks`; those before it are not read.
        placing: whether layers are asked for by `place_layer`, and so wait as they are stored.
        ahead_bytes: most bytes of layers that are ready or being read before they are asked for;
            one layer is always allowed.
        threads: where reading runs; default: the process's, four threads a tier.
        cancelled: asked while `next_layer` waits, which raises `LoadingCancelled` when it is true.

    Loading begins at once. `stall_s` is how long the caller waited, in seconds. Verifying what lies
    in memory, which its own thread does, is computing, and so is decoding by placing; where other
    threads must decode what lies in memory, reading its first layer is part of the wait.
    """

    def __init__(
        self,
        readers: Sequence[BlockReader | None],
        codec: Codec,
        recompute: Callable[[int], Sequence[LayerKV]],
        first_chunks: Sequence[int],
        *,
        placing: bool = False,
        ahead_bytes: int = AHEAD_BYTES,
        threads: IoThreads | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._cancelled = cancelled
        self._recompute, self._first_chunks = recompute, first_chunks
        self._unread = partial(ChunkReads, codec=codec, placing=placing)
        self._count = len(readers)
        self._chunks: dict[int, ChunkReads] = {}
        self._resident: dict[int, ResidentChunk] = {}
        for chunk, reader in enumerate(readers):
            if reader is None:
                continue
            wanted = self._wanting(chunk)
            resident = ResidentChunk.of(reader, codec, wanted, placing=placing) if wanted else None
            if resident is not None:
                self._resident[chunk] = resident
            else:
                self._chunks[chunk] = self._unread(reader, wanted=wanted)
        # Those of the next layer; None for what was placed already.
        self._verified: dict[int, LayerKV | None] = {}
        self._memory: dict[int, Sequence[LayerKV]] = {}
        layer_nbytes = sum(chunk.layer_nbytes for chunk in self._chunks.values())
        self._ahead = max(1, ahead_bytes // max(1, layer_nbytes))
        # Half of what may wait: one group is read while the one before is used up.
        self._largest = min(LARGEST_GROUP, max(1, self._ahead // 2))
        self.stall_s = 0.0
        self._times = ReadTimes()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._waiting = False
        self._next = 0
        self._threads = threads or io_threads()
        self._threads.join()
        try:
            # The first layer of what lies in memory is there sooner than a thread wakes to read it.
            begun = time.perf_counter()
            self._waiting = True
            self._read_on(at_once=True)
            self._waiting = False
            self.stall_s = time.perf_counter() - begun
            if not all(chunk.reader.in_memory for chunk in self._chunks.values()):
                # A first layer that had come before this found the caller still waiting.
                self._read_on()
        except BaseException:
            self.close()
            raise

    @property
    def computed(self) -> frozenset[int]:
        """The chunks that were not loaded, or not to the end."""
        return frozenset(self._memory)

    @property
    def holes(self) -> list[int]:
        """Chunks that have no block and were not computed yet."""
        there = self._chunks.keys() | self._resident.keys() | self._memory.keys()
        return [i for i in range(self._count) if i not in there]

    @property
    def load_s(self) -> float:
        """Seconds during which something was read, verified or decoded for this stream."""
        with self._changed:
            return self._times.busy_s

    @property
    def measured(self) -> dict[str, TierRead]:
        """What each tier delivered, by its name; what others had read already is not counted."""
        with self._changed:
            return self._times.by_tier()

    def compute(self, chunk: int) -> None:
        """Make the layers of a chunk that cannot be loaded."""
        self._read_on()
        layers = self._recompute(chunk)
        with self._changed:
            self._memory[chunk] = layers

    def next_layer(self) -> list[LayerKV]:
        return [kv for kv in self._advance(None) if kv is not None]

    def place_layer(self, place: Place) -> list[LayerKV | None]:
        """See `fusion.PlacingStream`."""
        return self._advance(place)

    def _advance(self, place: Place | None) -> list[LayerKV | None]:
        index = self._next
        if self._closed or index >= len(self._first_chunks):
            raise RuntimeError(f"layer {index} asked of a stream that is closed or at its end")
        self._verify(index, place)
        while not self._wait() or not self._place_read(place):
            for chunk in self._lost():
                self.compute(chunk)
        layer = self._taken()
        self._read_on()
        return layer

    def close(self) -> None:
        """Stop loading and release the blocks, without waiting for reads that are under way.

        The pin of a block that is being read goes when the read ends.
        """
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for chunk in self._chunks.values():
                chunk.drop()
            residents = list(self._resident.values())
            self._resident.clear()
            self._changed.notify_all()
        with ExitStack() as each:  # also those behind one that fails
            each.callback(self._threads.leave)
            for chunk in self._chunks.values():
                each.callback(chunk.reader.close)
            for resident in residents:
                each.callback(resident.close)

    # ---- the next layer --------------------------------------------------------------------------

    def _wait(self) -> bool:
        """Wait for the next layer; False if chunks of it must be computed first."""
        begun = time.perf_counter()
        with self._changed:
            self._waiting = True
            while not self._changed.wait_for(self._settled, timeout=_ASK_S):
                if self._cancelled():
                    self._waiting = False
                    raise LoadingCancelled
            self._waiting = False
            ended = time.perf_counter()
            self.stall_s += ended - begun
            self._times.waited(begun, ended)
            if self._error is not None:
                raise self._error
            if self._closed:
                raise RuntimeError(f"layer {self._next} asked of a stream that is closed")
            return not self._lost()

    def _place_read(self, place: Place | None) -> bool:
        """Place, or else decode, what was read and waits as it is stored.

        False if some of it does not hold a layer: that is for the caller to compute.
        """
        layer = self._next
        with self._changed:
            waiting = {
                chunk: (self._chunks[chunk], stored)
                for chunk in self._wanted()
                if self._is_missing(chunk) and (stored := self._stored(chunk)) is not None
            }
        if not waiting:
            return True
        damaged: list[int] = []
        if place is not None:
            damaged = place({chunk: stored for chunk, (_, stored) in waiting.items()})
        for chunk, (reads, stored) in waiting.items():
            segment = stored.release(layer)
            if chunk in damaged:
                continue
            try:
                self._verified[chunk] = None if place is not None else reads.decoded(layer, segment)
            except BlockFormatError:
                damaged.append(chunk)
        with self._changed:
            for chunk in damaged:
                waiting[chunk][0].fail()
        for chunk in damaged:
            waiting[chunk][0].reader.close()
        return not damaged

    def _taken(self) -> list[LayerKV | None]:
        with self._changed:
            if self._closed:
                raise RuntimeError(f"layer {self._next} asked of a stream that is closed")
            layer = [self._take(chunk) for chunk in self._wanted()]
            self._next += 1
            return layer

    def _wanted(self) -> range:
        return range(self._first_chunks[self._next], self._count)

    def _missing(self) -> list[int]:
        """Chunks of the next layer that are not there."""
        return [
            chunk
            for chunk in self._wanted()
            if self._is_missing(chunk)
            and not (chunk in self._chunks and self._chunks[chunk].has(self._next))
        ]

    def _is_missing(self, chunk: int) -> bool:
        """Whether the next layer of a chunk must still come from reading."""
        return chunk not in self._memory and chunk not in self._verified

    def _stored(self, chunk: int) -> StoredKV | None:
        """What holds the next layer of a chunk, read, as it is stored."""
        stored = self._chunks[chunk].stored
        return stored if stored is not None and self._next in stored else None

    def _lost(self) -> list[int]:
        """Those of them that nobody reads: for the caller to compute."""
        chunks = self._chunks
        return [i for i in self._missing() if i not in chunks or chunks[i].failed]

    def _settled(self) -> bool:
        """Whether the caller has waited long enough for the next layer."""
        if self._error is not None or self._closed:
            return True
        missing = self._missing()
        return not missing or bool(self._lost())

    def _take(self, chunk: int) -> LayerKV | None:
        if chunk in self._memory:
            return self._memory[chunk][self._next]
        if chunk in self._verified:
            return self._verified.pop(chunk)
        return self._chunks[chunk].take(self._next)

    # ---- what lies in memory ---------------------------------------------------------------------

    def _wanting(self, chunk: int, start: int = 0) -> list[int]:
        """The layers from `start` on in which a chunk is wanted."""
        firsts = self._first_chunks
        return [layer for layer in range(start, len(firsts)) if firsts[layer] <= chunk]

    def _verify(self, layer: int, place: Place | None) -> None:
        """Check a layer of what lies in memory; what is damaged is read like from any tier."""
        first = self._first_chunks[layer]
        wanted = {i: resident for i, resident in list(self._resident.items()) if i >= first}
        if not wanted:
            return
        begun = time.perf_counter()
        verified: list[tuple[str, int]] = []
        damaged: list[int] = []
        stored = {chunk: one.stored for chunk, one in wanted.items() if one.stored is not None}
        if place is not None and stored:
            damaged = place(stored)
        for chunk, resident in wanted.items():
            if chunk in damaged:
                continue
            if place is not None and chunk in stored:
                self._verified[chunk], nbytes = None, resident.count(layer)
            else:
                try:
                    self._verified[chunk], nbytes = resident.verified(layer)
                except BlockFormatError:
                    damaged.append(chunk)
                    continue
            verified.append((resident.tier, nbytes))
            if layer == resident.last:
                resident.close()
        ended = time.perf_counter()
        with self._changed:
            for read in _reads(verified, layer):
                self._times.add(Read(*read, begun, ended, first=layer == 0))
            for chunk in damaged:
                if self._closed:
                    break
                resident = self._resident.pop(chunk)
                self._chunks[chunk] = self._unread(
                    resident.reader, wanted=self._wanting(chunk, layer)
                )
        if damaged:
            self._read_on()

    # ---- reading ---------------------------------------------------------------------------------

    def _plan(self) -> list[tuple[ChunkReads, int, int]]:
        """The reads that there is room for, which are then under way."""
        with self._changed:
            if self._closed or self._error is not None:
                return []
            if self._waiting and self._settled():
                return []  # the caller wakes, takes its layer and comes here; do not crowd it out
            end = self._next + self._ahead
            chunks = self._chunks.values()
            # First layers first: what a tier reads ahead would only hold them up.
            busy = {chunk.reader.tier for chunk in chunks if not chunk.begun}
            groups = [
                (chunk, chunk.next_group(end, self._largest))
                for chunk in chunks
                if not (chunk.begun and chunk.reader.tier in busy)
            ]
        return [(chunk, *group) for chunk, group in groups if group is not None]

    def _read_on(self, *, at_once: bool = False) -> None:
        """Begin the reads that there is room for; those of memory `at_once`, in this thread."""
        near: list[Callable[[], None]] = []
        work: dict[tuple[str, int], list[Callable[[], None]]] = defaultdict(list)
        for chunk, first, last in self._plan():
            reader = chunk.reader
            read: Callable[[], None] = partial(self._read, chunk, first, last)
            if at_once and reader.in_memory:
                near.append(read)
            else:
                # Reading memory is computing: more threads would only get in each other's way.
                work[reader.tier, 1 if reader.in_memory else WIDTH].append(read)
        for (tier, width), reads in work.items():
            self._threads.submit(tier, reads, width=width)
        for read in near:
            read()

    def _read(self, chunk: ChunkReads, first: int, last: int) -> None:
        """Read one group of layers of one chunk, and begin what can be read next."""
        try:
            if not self._closed:
                self._load(chunk, first, last)
        except BaseException as exc:
            # Shown where the layer is asked for: a thread that fails silently would hang the run.
            with self._changed:
                self._error = exc
                self._changed.notify_all()

    def _load(self, chunk: ChunkReads, first: int, last: int) -> None:
        begun = time.perf_counter()
        cached_share = chunk.reader.cached_share  # before anything of it is read
        try:
            fetched = chunk.reader.fetch(first, last)
        except StoreError:
            self._arrived(chunk, first, None, Read("", 0, begun, time.perf_counter()))
            chunk.reader.close()
            return
        try:
            try:
                layers = chunk.unpacked(first, fetched.segments)
            except BlockFormatError:
                layers = None
            read = Read(
                fetched.tier,
                fetched.read_nbytes,
                begun,
                time.perf_counter(),
                first=first == 0,
                cached_share=cached_share,
            )
            self._arrived(chunk, first, layers, read)
            self._read_on()
            if chunk.ended:
                # Its encoded bytes are held while it is open; a run may go on for long.
                chunk.reader.close()
        finally:
            # Last, for the caller waits for layers, not for copies in faster tiers.
            if fetched.admit is not None:
                fetched.admit()

    def _arrived(
        self,
        chunk: ChunkReads,
        first: int,
        layers: Sequence[LayerKV | memoryview] | None,
        read: Read,
    ) -> None:
        """Hand a group over, or note that it cannot be had; wake the caller if that is its turn."""
        with self._changed:
            self._times.add(read)
            if self._closed:
                return
            if layers is None:
                chunk.fail()
            else:
                chunk.deliver(first, layers)
            if self._settled():
                self._changed.notify_all()


def _reads(verified: Sequence[tuple[str, int]], layer: int) -> Sequence[tuple[str, int]]:
    """One a chunk of layer 0, which is what a chunk costs apart from its bytes; else one a tier."""
    if layer == 0:
        return verified
    nbytes: Counter[str] = Counter()
    for tier, count in verified:
        nbytes[tier] += count
    return list(nbytes.items())
