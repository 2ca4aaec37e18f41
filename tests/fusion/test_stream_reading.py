"""How the layer stream reads: groups, several tiers at once, bounds, damage, cancellation."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref

import pytest
import torch

from kvrag.fusion.stream import Amounts, BlockStream, IoThreads, LoadingCancelled, TierRead
from kvrag.fusion.stream.chunk_reads import ChunkReads
from kvrag.fusion.stream.read_times import Read, ReadTimes
from kvrag.store.codecs import codec
from kvrag.store.disk import DiskTier
from kvrag.store.errors import BlockFormatError, StoreError
from kvrag.store.ram import RamTier
from kvrag.store.tiered import BlockReader, TieredStore, TierSlot
from tests.store.helpers import FINGERPRINT, make_block, make_key, token_ids

LAYERS = 12
SHAPE = (LAYERS, 1, 3, 4)
#: Of one decoded layer of one chunk: K and V in float32.
LAYER_NBYTES = 2 * 4 * 3 * 4
TIMEOUT_S = 20
RAW = codec("raw")


class Stepped(RamTier):
    """Fails or waits where it is told to, as if it were a slow, durable tier.

    `gates`: (name of the block, layer) → event that a read of that layer waits for. `failures`:
    the same → error that it raises. `waiting` is set when a read waits. `reads`: (name, first,
    last), in the order in which they began.
    """

    durable, in_process = True, False

    def __init__(self, name="stepped"):
        super().__init__(name)
        self.gates, self.failures, self.reads = {}, {}, []
        self.waiting = threading.Event()

    def segments(self, key, first, last):
        name = next(name for name in range(20) if make_key(name) == key)
        self.reads.append((name, first, last))
        for layer in range(first, last):
            gate = self.gates.get((name, layer))
            if gate is not None:
                self.waiting.set()
                assert gate.wait(TIMEOUT_S)
            if (name, layer) in self.failures:
                raise self.failures[name, layer]
        return super().segments(key, first, last)


def block(name):
    return make_block(name, layers=LAYERS, k_shape=SHAPE, v_shape=SHAPE)


def expected(name, layer):
    whole = block(name)
    return RAW.decode(whole.segments[layer], whole.header)


def computed(name):
    """What recomputing a chunk gives: like the stored layers, but told apart from them."""
    return [(k + 1, v + 1) for k, v in (expected(name, layer) for layer in range(LAYERS))]


def same(kv, name, layer, added=0):
    k, v = expected(name, layer)
    torch.testing.assert_close(kv[0], k + added, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(kv[1], v + added, rtol=0, atol=0, equal_nan=True)


def to_the_end(stream):
    for _ in range(LAYERS):
        stream.next_layer()


def join_threads():
    for thread in threading.enumerate():
        if thread.name.startswith("kvrag"):
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), thread


class Bench:
    """A store over tiers that hold blocks, and streams over it."""

    def __init__(self, **tiers):
        self.tiers = {name: tier for name, (tier, _) in tiers.items()}
        for tier, names in tiers.values():
            for name in names:
                tier.put(make_key(name), block(name))
        self.store = TieredStore([TierSlot(tier, None) for tier in self.tiers.values()])

    def stream(self, names, *, recompute=pytest.fail, first_chunks=(0,) * LAYERS, **options):
        readers = [
            self.store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))
            for name in names
        ]
        return BlockStream(readers, options.pop("decoder", RAW), recompute, first_chunks, **options)


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    join_threads()


@pytest.fixture
def stepped():
    return Stepped()


@pytest.fixture(params=["ram", "disk"])
def real(request, tmp_path):
    """A tier as it is used."""
    return RamTier() if request.param == "ram" else DiskTier(tmp_path / "kv")


# ---- what comes, and in which order --------------------------------------------------------------


def test_every_layer_of_every_chunk(real):
    bench = Bench(tier=(real, range(5)))
    stream = bench.stream(range(5))
    for layer in range(LAYERS):
        for name, kv in enumerate(stream.next_layer()):
            same(kv, name, layer)
    stream.close()
    assert stream.computed == frozenset()
    assert set(stream.measured) == {real.name}
    read = stream.measured[real.name]
    assert read.nbytes == 5 * LAYERS * 4096
    assert 0 < read.seconds == stream.load_s
    assert bench.store.stats().open_blocks == 0


def test_groups_grow_and_each_is_one_read(stepped):
    bench = Bench(stepped=(stepped, [0]))
    stream = bench.stream([0])
    to_the_end(stream)
    stream.close()
    assert stepped.reads == [(0, 0, 1), (0, 1, 3), (0, 3, 7), (0, 7, 12)]


def test_layers_that_are_not_wanted_are_not_read(stepped):
    """Groups end where a windowed layer does not want the chunk."""
    first_chunks = [1 if layer in (3, 4, 8) else 0 for layer in range(LAYERS)]
    bench = Bench(stepped=(stepped, [0, 1]))
    stream = bench.stream([0, 1], first_chunks=first_chunks)
    for layer, first in enumerate(first_chunks):
        layers = stream.next_layer()
        assert len(layers) == 2 - first
        same(layers[-1], 1, layer)
    stream.close()
    assert [read[1:] for read in stepped.reads if not read[0]] == [(0, 1), (1, 3), (5, 8), (9, 12)]


def test_a_chunk_first_wanted_far_behind_holds_up_nothing(stepped):
    first_chunks = [*[1] * (LAYERS - 1), 0]
    bench = Bench(stepped=(stepped, [0, 1]))
    stream = bench.stream([0, 1], first_chunks=first_chunks, ahead_bytes=4 * LAYER_NBYTES)
    counts = [len(stream.next_layer()) for _ in range(LAYERS)]
    stream.close()
    assert counts == [*[1] * (LAYERS - 1), 2]


def test_the_first_layers_come_before_any_second(stepped):
    """A tier reads nothing ahead while a chunk of it lacks the layer that computing waits for."""
    gate = stepped.gates[9, 0] = threading.Event()
    bench = Bench(stepped=(stepped, range(10)))
    stream = bench.stream(range(10))
    assert stepped.waiting.wait(TIMEOUT_S)
    gate.set()
    stream.next_layer()
    stream.close()
    assert {read[1:] for read in stepped.reads[:10]} == {(0, 1)}


def test_order_of_completion_is_not_the_order_of_results(stepped):
    """Chunk 0 is the last to arrive, layer by layer."""
    gates = [threading.Event() for _ in range(LAYERS)]
    stepped.gates = {(0, layer): gate for layer, gate in enumerate(gates)}
    bench = Bench(stepped=(stepped, range(3)))
    stream = bench.stream(range(3))
    for layer, gate in enumerate(gates):
        gate.set()
        if layer in (0, 2, 6, 11):  # the ends of its groups
            for name, kv in enumerate(stream.next_layer()):
                same(kv, name, stream._next - 1)
    for layer in range(4, LAYERS):
        for name, kv in enumerate(stream.next_layer()):
            same(kv, name, layer)
    stream.close()


def test_a_slow_tier_does_not_hold_up_the_reads_of_others(stepped):
    """While its first layer is awaited, the other tier's chunks are read as far as they may."""
    gate = stepped.gates[0, 0] = threading.Event()
    other = Stepped("other")
    bench = Bench(other=(other, [1, 2]), stepped=(stepped, [0]))
    far = other.gates[2, 7] = threading.Event()
    stream = bench.stream([0, 1, 2])
    assert stepped.waiting.wait(TIMEOUT_S)
    assert other.waiting.wait(TIMEOUT_S)  # behind its groups [0, 1), [1, 3) and [3, 7)
    assert stepped.reads == [(0, 0, 1)]
    far.set()
    gate.set()
    for layer in range(LAYERS):
        for name, kv in enumerate(stream.next_layer()):
            same(kv, name, layer)
    stream.close()
    assert set(stream.measured) == {"other", "stepped"}


def test_blocks_in_memory_are_ready_without_a_thread():
    bench = Bench(ram=(RamTier(), range(3)))
    stream = bench.stream(range(3))
    assert not [t for t in threading.enumerate() if t.name.startswith("kvrag")]
    for name, kv in enumerate(stream.next_layer()):
        same(kv, name, 0)
    stream.close()


# ---- bounds --------------------------------------------------------------------------------------


class Decoding:
    """A codec whose segments native code does not know."""

    def layout(self, header):
        return None


class Counting(Decoding):
    """A codec that counts decoded layers alive: at most how many there ever were."""

    def __init__(self):
        self.lock, self.alive, self.most = threading.Lock(), 0, 0
        self.reached = threading.Event()
        self.limit = None

    def decode(self, buffer, header):
        k, v = RAW.decode(buffer, header)
        with self.lock:
            self.alive += 1
            self.most = max(self.most, self.alive)
            if self.alive == self.limit:
                self.reached.set()
        weakref.finalize(k, self.gone)
        return k, v

    def gone(self):
        with self.lock:
            self.alive -= 1


@pytest.mark.parametrize("layers_ahead", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("durable", [True, False])
def test_decoded_layers_that_wait_are_bounded(layers_ahead, durable):
    tier = Stepped() if durable else RamTier()
    bench = Bench(tier=(tier, range(4)))
    counting = Counting()
    stream = bench.stream(
        range(4), decoder=counting, ahead_bytes=layers_ahead * 4 * LAYER_NBYTES + 17
    )
    window = max(1, layers_ahead)
    for _ in range(LAYERS):
        with counting.lock:
            before = counting.most
        layer = stream.next_layer()
        # Those in the caller's hands, and those of the window behind it.
        assert before <= 4 * (window + 1)
        del layer
    stream.close()
    assert counting.most <= 4 * (window + 1)
    gc.collect()
    assert counting.alive == 0


def test_the_whole_window_is_read_while_nobody_asks():
    tier = Stepped()
    bench = Bench(tier=(tier, range(2)))
    counting = Counting()
    counting.limit = 2 * 3  # groups [0, 1) and [1, 3) of 4 layers; [3, 5) waits until it fits
    stream = bench.stream(range(2), decoder=counting, ahead_bytes=4 * 2 * LAYER_NBYTES)
    assert counting.reached.wait(TIMEOUT_S)
    assert {read[1:] for read in tier.reads} == {(0, 1), (1, 3)}
    counting.reached.clear()
    counting.limit = 2 * 5 - 2
    stream.next_layer()
    assert counting.reached.wait(TIMEOUT_S)
    stream.close()


def test_threads_are_few_however_many_requests_there_are(stepped):
    gate = threading.Event()
    stepped.gates = {(name, 0): gate for name in range(20)}
    bench = Bench(stepped=(stepped, range(20)))
    streams = [bench.stream([name, (name + 1) % 20]) for name in range(20)]
    assert stepped.waiting.wait(TIMEOUT_S)
    assert len([t for t in threading.enumerate() if t.name.startswith("kvrag-io")]) <= 4
    gate.set()
    for stream in streams:
        stream.next_layer()
        stream.close()


# ---- damage, errors, cancellation ----------------------------------------------------------------


def test_damage_in_the_middle_recomputes_that_chunk_alone(stepped):
    stepped.failures[1, 5] = BlockFormatError("the checksum of segment 5 does not match")
    bench = Bench(stepped=(stepped, range(3)))
    made = []
    stream = bench.stream(range(3), recompute=lambda name: made.append(name) or computed(name))
    for layer in range(LAYERS):
        for name, kv in enumerate(stream.next_layer()):
            # Its group [3, 7) as a whole cannot be had.
            same(kv, name, layer, added=name == 1 and layer >= 3)
    stream.close()
    assert made == [1]
    assert stream.computed == {1}
    assert bench.store.stats().open_blocks == 0


def test_a_layer_that_cannot_be_decoded_is_recomputed(real):
    class Odd(Decoding):
        def decode(self, buffer, header):
            if header.key == make_key(1):
                raise BlockFormatError("not mine")
            return RAW.decode(buffer, header)

    bench = Bench(tier=(real, range(2)))
    stream = bench.stream(range(2), recompute=computed, decoder=Odd())
    for layer in range(LAYERS):
        zero, one = stream.next_layer()
        same(zero, 0, layer)
        same(one, 1, layer, added=1)
    stream.close()
    assert stream.computed == {1}


def test_chunks_are_computed_without_waiting_for_slow_ones(stepped):
    """A failed chunk is computed while another is still on its way."""
    gate = stepped.gates[0, 0] = threading.Event()
    stepped.failures[1, 0] = BlockFormatError("damaged")
    bench = Bench(stepped=(stepped, range(2)))
    stream = bench.stream(range(2), recompute=lambda name: gate.set() or computed(name))
    zero, one = stream.next_layer()
    same(zero, 0, 0)
    same(one, 1, 0, added=1)
    stream.close()


@pytest.mark.parametrize("layer", [0, 4, 11])
@pytest.mark.parametrize("durable", [True, False])
def test_an_error_that_is_none_of_the_stores_surfaces(layer, durable):
    tier = Stepped()
    tier.durable = durable
    tier.failures[1, layer] = ZeroDivisionError("a bug")
    bench = Bench(tier=(tier, range(3)))
    stream = bench.stream(range(3))
    for _ in range(2):  # and stays
        with pytest.raises(ZeroDivisionError, match="a bug"):
            to_the_end(stream)
    stream.close()
    join_threads()
    assert bench.store.stats().open_blocks == 0


def test_cancelled_while_reads_are_blocked(stepped):
    """`close` waits for none of them; pins go at once, or with the read that is under way."""
    gate = threading.Event()
    stepped.gates = {(name, 1): gate for name in range(2)}
    bench = Bench(stepped=(stepped, range(5)))
    stream = bench.stream(range(5))
    stream.next_layer()
    assert stepped.waiting.wait(TIMEOUT_S)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert bench.store.stats().open_blocks <= 2
    with pytest.raises(RuntimeError, match="closed"):
        stream.next_layer()
    gate.set()
    join_threads()
    assert bench.store.stats().open_blocks == 0


def test_a_reader_that_cannot_be_closed_keeps_no_other_open(stepped, monkeypatch):
    """The blocks behind it stayed pinned, and the threads for ever."""
    gate = threading.Event()
    stepped.gates = {(name, 0): gate for name in range(3)}
    bench = Bench(stepped=(stepped, range(3)))
    stream = bench.stream(range(3))
    assert stepped.waiting.wait(TIMEOUT_S)
    close, closed = BlockReader.close, []

    def failing(reader):
        close(reader)
        closed.append(reader)
        if len(closed) == 1:
            raise ZeroDivisionError

    monkeypatch.setattr(BlockReader, "close", failing)
    with pytest.raises(ZeroDivisionError):
        stream.close()
    assert len(closed) == 3
    gate.set()
    join_threads()
    assert bench.store.stats().open_blocks == 0


class Fresh(Stepped):
    """Hands out memory of its own for each read; `alive` is how much of it is still held."""

    def __init__(self):
        super().__init__()
        self.alive = 0

    def segments(self, key, first, last):
        views = [self.Memory(view) for view in super().segments(key, first, last)]
        for view in views:
            self.alive += len(view)
            weakref.finalize(view, self.gone, len(view))
        return [memoryview(view).toreadonly() for view in views]

    def gone(self, nbytes):
        self.alive -= nbytes

    class Memory(bytearray):
        __slots__ = ("__weakref__",)


class Copying:
    """A codec whose layers do not lie in the encoded bytes."""

    def decode(self, buffer, header):
        return tuple(part.clone() for part in RAW.decode(buffer, header))


@pytest.mark.parametrize("fails", [False, True])
def test_encoded_bytes_go_when_all_is_decoded_not_with_the_run(fails):
    """A run that asks the question first goes on for long behind the last layer's loading."""
    tier = Fresh()
    if fails:
        tier.failures[0, 5] = BlockFormatError("damaged")
    bench = Bench(tier=(tier, [0]))
    stream = bench.stream([0], decoder=Copying(), recompute=computed)
    to_the_end(stream)
    deadline = time.monotonic() + TIMEOUT_S
    while tier.alive:
        assert time.monotonic() < deadline, tier.alive
        time.sleep(0.01)
    assert bench.store.stats().open_blocks == 0
    stream.close()


def test_a_cancelled_request_does_not_wait_for_a_tier_that_hangs(stepped):
    gate = stepped.gates[0, 1] = threading.Event()
    asked = threading.Event()
    bench = Bench(stepped=(stepped, [0]))
    stream = bench.stream([0], cancelled=asked.is_set)
    stream.next_layer()
    assert stepped.waiting.wait(TIMEOUT_S)
    threading.Timer(0.05, asked.set).start()
    with pytest.raises(LoadingCancelled):
        stream.next_layer()
    stream.close()
    gate.set()


def test_closed_while_the_caller_waits(stepped):
    gate = stepped.gates[0, 0] = threading.Event()
    bench = Bench(stepped=(stepped, [0]))
    stream = bench.stream([0])
    failures = []

    def wait():
        try:
            stream.next_layer()
        except RuntimeError as exc:
            failures.append(str(exc))

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert stepped.waiting.wait(TIMEOUT_S)
    stream.close()
    waiting.join(TIMEOUT_S)
    gate.set()
    assert failures
    assert "closed" in failures[0]


def test_a_store_closed_under_a_stream_loses_what_is_not_in_hand(real):
    bench = Bench(tier=(real, range(2)))
    stream = bench.stream(range(2), recompute=computed, ahead_bytes=0)
    stream.next_layer()
    bench.store.close()
    for layer in range(1, LAYERS):
        assert len(stream.next_layer()) == 2, layer
    stream.close()
    assert stream.computed == (set() if real.in_process else {0, 1})


# ---- sharing and promotion -----------------------------------------------------------------------


def test_two_requests_share_blocks_and_each_byte_is_read_once(stepped):
    bench = Bench(stepped=(stepped, range(4)))
    # What both want is open, and so shared, from the first stream's beginning to the second's.
    both_open = threading.Event()
    stepped.gates = {(name, LAYERS - 1): both_open for name in (1, 2)}
    one, other = bench.stream([0, 1, 2]), bench.stream([2, 1, 3])
    both_open.set()
    for layer in range(LAYERS):
        for names, stream in (([0, 1, 2], one), ([2, 1, 3], other)):
            for name, kv in zip(names, stream.next_layer(), strict=True):
                same(kv, name, layer)
    one.close()
    other.close()
    read = [(name, layer) for name, a, b in stepped.reads for layer in range(a, b)]
    assert sorted(read) == [(name, layer) for name in range(4) for layer in range(LAYERS)]
    nbytes = sum(stream.measured["stepped"].nbytes for stream in (one, other))
    assert nbytes == 4 * LAYERS * 4096


class SlowToTake(RamTier):
    """A memory tier in which putting waits."""

    def __init__(self):
        super().__init__("near")
        self.gate, self.waiting = threading.Event(), threading.Event()

    def put(self, key, block):
        self.waiting.set()
        assert self.gate.wait(TIMEOUT_S)
        super().put(key, block)


def test_layers_do_not_wait_for_admission_to_faster_tiers(stepped):
    near = SlowToTake()
    bench = Bench(near=(near, []), stepped=(stepped, [0]))
    stream = bench.stream([0])
    for layer in range(LAYERS):
        same(stream.next_layer()[0], 0, layer)
    stream.close()
    assert near.waiting.wait(TIMEOUT_S)
    assert bench.store.stats().open_blocks == 1  # pinned until it is copied
    near.gate.set()
    join_threads()
    assert bench.store.stats().open_blocks == 0
    assert near.contains(make_key(0))


def test_admitted_although_decoding_failed(stepped):
    """A pin that waits for its admission is not lost with the error."""
    last = bytes(block(0).segments[-1])

    class Odd(Decoding):
        def decode(self, buffer, header):
            if make_key(0) == header.key and last.startswith(bytes(buffer)):
                raise ZeroDivisionError
            return RAW.decode(buffer, header)

    near = RamTier("near")
    bench = Bench(near=(near, []), stepped=(stepped, [0]))
    stream = bench.stream([0], decoder=Odd())
    with pytest.raises(ZeroDivisionError):
        to_the_end(stream)
    stream.close()
    join_threads()
    assert near.contains(make_key(0))
    assert bench.store.stats().open_blocks == 0


def test_many_short_streams_leave_nothing(tmp_path):
    ram, disk = RamTier(), DiskTier(tmp_path / "kv")
    bench = Bench(ram=(ram, range(2)), disk=(disk, range(2, 6)))
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for turn in range(60):
        stream = bench.stream([turn % 6, (turn + 1) % 6, (turn + 2) % 6])
        for _ in range(turn % (LAYERS + 1)):
            stream.next_layer()
        stream.close()
    join_threads()
    assert bench.store.stats().open_blocks == 0
    if files is not None:
        assert len(os.listdir("/proc/self/fd")) <= files


# ---- the parts -----------------------------------------------------------------------------------


def test_read_times_count_overlaps_once():
    times = ReadTimes()
    times.add(Read("disk", 10, 1.0, 3.0, first=True, cached_share=0.5))
    times.add(Read("disk", 20, 2.0, 4.0, first=True))
    times.add(Read("disk", 8, 6.0, 7.0, cached_share=0.25))
    times.add(Read("disk", 4, 6.5, 7.5))
    times.add(Read("disk", 0, 7.0, 9.0))  # another request had read it
    times.add(Read("ram", 7, 3.5, 4.5))
    times.waited(0.5, 4.5)
    times.waited(5.0, 6.25)
    times.waited(7.25, 8.0)
    assert times.by_tier() == {
        "disk": TierRead(
            42, 4.5, Amounts(1.5, 25, 5), 3.0, Amounts(0, 10, 2), rest_s=1.5, rest_waited_s=0.5
        ),
        "ram": TierRead(7, 1.0, Amounts(), 0.0, Amounts(0, 7, 0), rest_s=1.0, rest_waited_s=1.0),
    }
    assert times.busy_s == 6.5
    assert ReadTimes().by_tier() == {}


def test_a_group_waits_until_it_fits():
    reads = ChunkReads(None, RAW, range(12), placing=False)
    assert reads.next_group(end=4, largest=2) == (0, 1)
    assert reads.next_group(end=4, largest=2) is None  # one at a time
    reads.deliver(0, [(None, None)])
    assert not reads.has(1)
    assert reads.next_group(end=2, largest=2) is None
    assert reads.next_group(end=3, largest=2) == (1, 3)
    reads.fail()
    assert reads.next_group(end=12, largest=2) is None
    assert reads.has(0)


def test_threads_that_cannot_start_are_an_error(monkeypatch):
    threads = IoThreads()

    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        threads.submit("disk", [pytest.fail])
    monkeypatch.undo()
    done = threading.Event()
    threads.submit("disk", [done.set])
    assert done.wait(TIMEOUT_S)


def test_a_thread_that_does_not_start_loses_no_work_of_others(monkeypatch):
    threads = IoThreads()
    done = []

    def refuse(self):
        # Another request's work has come while this thread was to start, and counts on it.
        threads._lanes["disk"].work.append(lambda: done.append("other"))
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        threads.submit("disk", [pytest.fail])
    assert done == ["other"]


def test_work_that_raises_ends_no_thread(caplog):
    threads = IoThreads()
    threads.join()
    done = threading.Event()
    threads.submit("disk", [lambda: 1 / 0, done.set], width=1)
    assert done.wait(TIMEOUT_S)
    threads.leave()
    assert "I/O thread" in caplog.text


def test_closed_reader_cannot_be_read(stepped):
    bench = Bench(stepped=(stepped, [0]))
    reader = bench.store.open(make_key(0), fingerprint=FINGERPRINT, token_ids=token_ids(0))
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.fetch(0, 1)
