"""K and V on their way to a device: in order, out of staging that holds still, into a cache."""

from __future__ import annotations

import logging
import threading
import weakref

import pytest
import torch

from kvrag.blocks import PlacedBlocks
from kvrag.fusion import create
from kvrag.fusion.cacheblend import CacheBlend
from kvrag.fusion.controller.plan import ChunkSource, make_plan
from kvrag.fusion.device import DeviceCache, DeviceCopies, DeviceLoading, HeldChunks
from kvrag.fusion.device.copy_stream import BlockingCopies, copy_stream
from kvrag.fusion.reuse import Reuse
from kvrag.models.layer import Layer
from kvrag.prefill import DEVICE, Prefill
from kvrag.prompting import PromptLayout
from kvrag.store.keys import BlockKey
from tests.fusion.device_doubles import FILL, LateCopies
from tests.fusion.rooms import CHUNKS, CountingTier, Room
from tests.models.tiny_models import token_ids

CPU = torch.device("cpu")
READY = BlockingCopies(CPU).record()


class Layers:
    """A layer stream of random K and V; `sizes` are the tokens of each chunk."""

    def __init__(self, count, sizes, dtype=torch.float32):
        self.layers = [
            [(torch.randn(2, n, 8).to(dtype), torch.randn(2, n, 8).to(dtype)) for n in sizes]
            for _ in range(count)
        ]
        self.next, self.closed = 0, 0

    def next_layer(self):
        self.next += 1
        return self.layers[self.next - 1]

    def close(self):
        self.closed += 1


def check_equal(copied, expected):
    assert len(copied) == len(expected)
    for ours, theirs in zip(copied, expected, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            assert x.dtype is y.dtype
            assert torch.equal(x, y)


def on_device(room, stream, cache=None):
    """The room's prefill with a device of its own."""
    layout = PromptLayout.of(room.model.tokenizer, "Answer.")
    room.prefill = Prefill(
        room.model,
        layout,
        PlacedBlocks(room.blocks, room.blocks, room.store.locate),
        room.prefixes,
        room.controller,
        DeviceLoading(stream, cache),
    )
    return room


# ---- copies --------------------------------------------------------------------------------------


def check_order(stream, layers):
    """For each layer: its copies, one event, the computing's wait, and then the uses."""
    place = {step: i for i, step in enumerate(stream.log)}
    at = 0
    for index, count in enumerate(layers):
        for copy in range(at, at + count):
            assert stream.behind[copy] == index, "one event a layer"
            order = [("copy", copy), ("record", index), ("wait", index), ("use", copy)]
            assert sorted(order, key=place.__getitem__) == order
        at += count
    assert at == len(stream.copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_copy_record_wait_use_for_every_layer(dtype):
    """Even if the device does nothing before somebody uses it: then the bytes are right."""
    source, stream = Layers(7, (5, 1, 12), dtype), LateCopies(lazy=True)
    copies = DeviceCopies(source, stream)
    for expected in source.layers:
        layer = copies.next_layer()
        assert all((x.view(torch.uint8) == FILL).all() for kv in layer for x in kv)
        for k, v in layer:
            stream.use(k)
            assert k.data_ptr() % 2 == v.data_ptr() % 2 == 0
        check_equal(layer, expected)
    copies.close()
    check_order(stream, [3] * 7)


def test_a_staging_is_written_when_its_copies_are_done():
    """A device that lags behind all layers: the host waits for copies two layers ago, no others."""
    source, stream = Layers(6, (5, 3)), LateCopies(lazy=True)
    copies = DeviceCopies(source, stream)
    layers = [copies.next_layer() for _ in source.layers]
    assert [step for step in stream.log if step[0] == "synchronize"] == [
        ("synchronize", event) for event in range(4)
    ]
    for event in range(4):
        later = stream.log.index(("copy", 2 * (event + 2)))
        assert stream.log.index(("synchronize", event)) < later
    assert len(stream.pinned) == 2
    assert stream.pending == 4
    copies.close()
    assert stream.pending == 0
    for layer, expected in zip(layers, source.layers, strict=True):
        check_equal(layer, expected)


def test_what_is_pinned_already_is_copied_from_there():
    """Without a staging between; and it stays until the copies are done, whoever lets go of it."""
    source, stream = Layers(5, (5, 3, 4)), LateCopies(lazy=True)
    stream.pinned += [part for layer in source.layers for part in layer[1]]
    before = len(stream.pinned)
    expected = [[(k.clone(), v.clone()) for k, v in layer] for layer in source.layers]
    copies = DeviceCopies(source, stream)
    layers = [copies.next_layer() for _ in source.layers]
    assert len(stream.pinned) == before + 2
    assert len(stream.copies) == 5 * (1 + 2 + 1)
    held = [weakref.ref(layer[1][0]) for layer in source.layers]
    source.layers.clear()
    stream.pinned.clear()
    # The device is behind by two layers, and what it has still to copy is kept for it.
    assert [ref() is not None for ref in held] == [False, False, False, True, True]
    copies.close()
    assert not any(ref() for ref in held)
    for layer, kv in zip(layers, expected, strict=True):
        check_equal(layer, kv)


def test_layers_of_other_sizes():
    """A window lets chunks in and out: staging grows, and a layer without chunks copies nothing."""
    source, stream = Layers(6, (4, 9)), LateCopies()
    source.layers[0], source.layers[3] = source.layers[0][1:], []
    source.layers[4] = Layers(1, (40, 2)).layers[0]
    copies = DeviceCopies(source, stream)
    for expected in source.layers:
        check_equal(copies.next_layer(), expected)
    copies.close()
    assert stream.log.count(("record", 4)) == 1
    assert ("record", 5) not in stream.log


@pytest.mark.parametrize("after", [0, 1, 3])
def test_closed_early_waits_for_what_reads_the_staging(after):
    source, stream = Layers(6, (4, 9)), LateCopies(lazy=True)
    copies = DeviceCopies(source, stream)
    for _ in range(after):
        copies.next_layer()
    copies.close()
    assert source.closed == 1
    assert stream.pending == 0
    assert not any(
        isinstance(value, torch.Tensor) for s in copies._stagings for value in vars(s).values()
    )
    copies.close()


def test_a_full_device_is_an_error_that_releases_everything():
    source, stream = Layers(6, (4, 9)), LateCopies(lazy=True, fails_at=3)
    copies = DeviceCopies(source, stream)
    copies.next_layer()
    with pytest.raises(torch.OutOfMemoryError):
        copies.next_layer()
    assert stream.pending == 3
    copies.close()
    assert source.closed == 1
    assert stream.pending == 0


@pytest.mark.parametrize("name", ["reuse", "cacheblend", "fast", "true"])
def test_a_strategy_runs_over_copies(tiny, monkeypatch, name):
    """Bit for bit as without, with its uses behind the waits, for each layer and chunk."""
    room = Room(tiny("qwen3", "llama3"), dtype=torch.float32)
    room.add(*CHUNKS)
    strategy = create(name, 0.3)
    expected = room.run(CHUNKS, strategy)
    stream = LateCopies()
    on_device(room, stream)
    put = Layer.put

    def noting(self, k, v, *rest):
        if stream.number_of(k) is not None:
            stream.use(k)
        put(self, k, v, *rest)

    monkeypatch.setattr(Layer, "put", noting)
    prefilled = room.run(CHUNKS, strategy)
    assert torch.equal(prefilled.logits, expected.logits)
    check_order(stream, [3] * room.model.decoder.config.num_layers)
    assert room.store.stats().open_blocks == 0


def test_missing_and_windowed_chunks_over_copies(tiny):
    room = Room(tiny("gemma3", "linear"))
    expected = room.run(CHUNKS, CacheBlend(ratio=0.3))
    other = on_device(Room(tiny("gemma3", "linear")), LateCopies(), DeviceCache(2**30))
    for tier in ("computed", "device"):
        prefilled = other.run(CHUNKS, CacheBlend(ratio=0.3))
        assert torch.equal(prefilled.logits, expected.logits)
        assert prefilled.tiers == (tier,) * 3


def test_the_device_of_a_copy_stream():
    assert isinstance(copy_stream(CPU), BlockingCopies)
    assert DeviceLoading.of(CPU, 0) is None
    assert DeviceLoading.of(CPU, 1).cache.stats().limit_bytes == 1
    assert DeviceLoading.of(torch.device("meta"), 0).cache is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_copies():
    source, device = Layers(6, (40, 300)), torch.device("cuda")
    copies = DeviceCopies(source, copy_stream(device))
    layers = [copies.next_layer() for _ in source.layers]
    copies.close()
    for layer, expected in zip(layers, source.layers, strict=True):
        check_equal([(k.cpu(), v.cpu()) for k, v in layer], expected)


# ---- the cache -----------------------------------------------------------------------------------


def key(number):
    return BlockKey("0" * 32, f"{number:064x}")


def layers_of(nbytes):
    """One layer of so many bytes."""
    return [(torch.zeros(nbytes // 2, dtype=torch.uint8), torch.zeros(nbytes // 2).byte())]


def hold(cache, number, nbytes=40):
    room = cache.reserve(key(number), nbytes)
    if room is None:
        return False
    room.fill(layers_of(nbytes), READY)
    return True


def held(cache, *numbers):
    """Which of them are there, without a use that would keep them longer than others."""
    return [number for number in numbers if key(number) in cache._entries]


def test_the_least_recently_used_goes_first():
    cache = DeviceCache(100)
    assert hold(cache, 1)
    assert hold(cache, 2)
    cache.lease(key(1)).close()
    assert hold(cache, 3)
    assert held(cache, 1, 2, 3) == [1, 3]
    stats = cache.stats()
    assert (stats.blocks, stats.used_bytes, stats.evictions, stats.admissions) == (2, 80, 1, 3)
    assert cache.lease(key(2)) is None
    assert (cache.stats().hits, cache.stats().misses) == (1, 1)


def test_what_is_in_use_stays():
    cache = DeviceCache(100)
    hold(cache, 1)
    hold(cache, 2)
    leases = [cache.lease(key(1)), cache.lease(key(1)), cache.lease(key(2))]
    assert not hold(cache, 3)
    leases[0].close()
    leases[0].close()
    assert not hold(cache, 3), "a lease was closed twice, and took another's pin"
    leases[1].close()
    assert hold(cache, 3)
    assert held(cache, 1, 2, 3) == [2, 3]


def test_room_counts_before_it_is_filled():
    cache = DeviceCache(100)
    first, second = cache.reserve(key(1), 60), cache.reserve(key(2), 40)
    assert cache.stats().used_bytes == 100
    assert cache.stats().blocks == 0
    assert cache.reserve(key(1), 1) is None, "somebody loads it already"
    assert cache.reserve(key(3), 1) is None
    assert cache.lease(key(1)) is None
    first.close()
    first.close()
    assert cache.stats().used_bytes == 40
    second.fill(layers_of(40), READY)
    second.close()
    assert held(cache, 2) == [2]
    assert cache.stats().used_bytes == 40
    assert cache.reserve(key(2), 1) is None, "it is held already"
    assert cache.reserve(key(4), 101) is None


def test_a_room_takes_no_more_than_it_has():
    cache = DeviceCache(100)
    room = cache.reserve(key(1), 30)
    with pytest.raises(ValueError, match="40 bytes for a room of 30"):
        room.fill(layers_of(40), READY)
    room.fill(layers_of(30), READY)
    with pytest.raises(ValueError, match="closed"):
        room.fill(layers_of(30), READY)


def test_clear_forgets_and_leaves_leases_alone():
    cache = DeviceCache(100)
    hold(cache, 1)
    lease, room = cache.lease(key(1)), cache.reserve(key(2), 40)
    cache.clear()
    assert cache.lease(key(1)) is None
    assert cache.stats().used_bytes == 40
    assert len(lease.layers) == 1
    assert hold(cache, 1)
    lease.close()
    other = cache.lease(key(1))
    assert cache.reserve(key(3), 60) is None, "the new entry lost its pin to the old lease"
    other.close()
    room.fill(layers_of(40), READY)
    assert held(cache, 1, 2) == [1, 2]


@pytest.mark.parametrize("limit", [-1, -(2**40)])
def test_no_limit_below_zero(limit):
    with pytest.raises(ValueError, match="limit"):
        DeviceCache(limit)


def test_many_threads_stay_under_the_limit():
    """The sum over all, held and being loaded, is never above it, and what is leased is whole."""
    cache, limit = DeviceCache(200), 200
    wrong, done = [], threading.Event()

    def watch():
        while not done.is_set():
            if cache.stats().used_bytes > limit:
                wrong.append(cache.stats())

    def work(seed):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed)).tolist()
        for step in order:
            number = step % 15
            if (lease := cache.lease(key(number))) is not None:
                if len(lease.layers) != 1 or lease.layers[0][0].numel() != 10 + number:
                    wrong.append(number)
                lease.close()
            elif (room := cache.reserve(key(number), 2 * (10 + number))) is not None:
                if step % 7:
                    room.fill(layers_of(2 * (10 + number)), READY)
                room.close()

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert not wrong
    stats = cache.stats()
    assert stats.used_bytes == sum(
        k.nbytes + v.nbytes for entry in cache._entries.values() for k, v in entry.layers
    )
    assert stats.evictions == stats.admissions - stats.blocks > 0


def test_who_leases_waits_for_copies_that_are_under_way():
    """Admitted when its last copy was begun: another's computing must not overtake that."""
    source, stream, cache = Layers(3, (5, 9)), LateCopies(lazy=True), DeviceCache(2**20)
    device = DeviceLoading(stream, cache)
    for reads in (source, Layers(3, ())):
        # As for computing on a stream of its own.
        stream.awaited = -1
        held = HeldChunks(device, [key(1), key(2)], 2)
        layers = held.layers(reads, [0, 0, 0])
        for expected in source.layers:
            layer = layers.next_layer()
            if held.to_load == []:
                for k, _ in layer:
                    stream.use(k)
                check_equal(layer, expected)
        layers.close()
        held.close()
    assert held.to_load == []


# ---- the cache in front of the store -------------------------------------------------------------


@pytest.mark.parametrize("name", ["reuse", "cacheblend", "fast"])
def test_the_second_request_reads_nothing(tiny, name):
    """And gives the same bits, in any order, as a store alone."""
    plain, tier = Room(tiny("llama"), dtype=torch.bfloat16), CountingTier()
    room = Room(tiny("llama"), dtype=torch.bfloat16, tier=tier)
    plain.add(*CHUNKS)
    room.add(*CHUNKS)
    cache = DeviceCache(2**30)
    on_device(room, LateCopies(), cache)
    strategy = create(name, 0.3)
    assert room.run(CHUNKS, strategy).tiers == ("ram",) * 3
    tier.read.clear()
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
        chunks = [CHUNKS[i] for i in order]
        prefilled = room.run(chunks, strategy)
        assert prefilled.tiers == ("device",) * 3
        assert torch.equal(prefilled.logits, plain.run(chunks, strategy).logits)
        assert prefilled.tokens.reused > 0
    assert tier.read == []
    assert cache.stats().hits == 9
    assert cache.stats().misses == cache.stats().admissions == 3


def test_some_chunks_held_and_some_missing(tiny):
    """Device, tier and computed side by side."""
    room = Room(tiny("qwen3", "llama3"))
    on_device(room, LateCopies(), DeviceCache(2**30))
    room.run(CHUNKS[1:2], Reuse())
    room.add(CHUNKS[2])
    prefilled = room.run([*CHUNKS, CHUNKS[0]], CacheBlend(ratio=0.3))
    # Behind itself it is there already: one prompt computes a passage once.
    assert prefilled.tiers == ("computed", "device", "ram", "awaited")
    plain = Room(tiny("qwen3", "llama3"))
    expected = plain.run([*CHUNKS, CHUNKS[0]], CacheBlend(ratio=0.3))
    assert torch.equal(prefilled.logits, expected.logits)


def test_the_controller_waits_for_nothing_that_is_held(tiny):
    """A held chunk has no tier to wait for, and is not computed either."""
    room = Room(tiny("llama"))
    plans = [
        make_plan(Reuse(), room.model.decoder, room.prompt(CHUNKS), sources)
        for sources in (
            [ChunkSource(DEVICE, ())] * 3,
            [ChunkSource(DEVICE, ()), ChunkSource("disk", (9, 9, 9, 9)), None],
        )
    ]
    assert [plan.tiers for plan in plans] == [frozenset(), {"disk"}]
    assert plans[0].first.visits == 0 < plans[1].first.visits


def test_fusion_leaves_held_kv_as_it_was(tiny):
    room, cache = Room(tiny("llama")), DeviceCache(2**30)
    on_device(room, LateCopies(), cache)
    room.run(CHUNKS, Reuse())
    before = [(k.clone(), v.clone()) for entry in cache._entries.values() for k, v in entry.layers]
    for name in ("cacheblend", "fast", "true"):
        room.run(CHUNKS, create(name, 0.5))
    after = [kv for entry in cache._entries.values() for kv in entry.layers]
    check_equal(after, before)


def test_a_small_cache_holds_what_fits(tiny):
    """Longer prompts than it takes: requests go on, and it is never above its limit."""
    room = Room(tiny("llama"))
    config = room.model.decoder.config
    token = 2 * 8 * config.num_kv_heads * config.head_dim * config.num_layers
    cache = DeviceCache(45 * token)
    on_device(room, LateCopies(), cache)
    expected = Room(tiny("llama")).run(CHUNKS, Reuse())
    for _ in range(3):
        assert torch.equal(room.run(CHUNKS, Reuse()).logits, expected.logits)
        assert 0 < cache.stats().used_bytes <= 45 * token
    assert cache.stats().blocks == 2


@pytest.mark.parametrize("after", range(1, 8))
def test_a_cancelled_request_leaves_no_part_of_a_chunk(tiny, after):
    room, cache = Room(tiny("llama")), DeviceCache(2**30)
    room.add(*CHUNKS)
    stream = LateCopies()
    on_device(room, stream, cache)
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) > after

    finished = room.run(CHUNKS, Reuse(), cancelled=cancelled) is not None
    stats = cache.stats()
    assert (stats.blocks > 0) == (stats.used_bytes > 0)
    complete = len(stream.copies) == 3 * room.model.decoder.config.num_layers
    assert stats.blocks == (3 if complete else 0)
    assert finished <= complete
    assert room.store.stats().open_blocks == 0
    assert room.run(CHUNKS, Reuse()).tiers == ("device" if complete else "ram",) * 3


def test_a_failing_copy_leaves_no_part_of_a_chunk(tiny):
    room, cache = Room(tiny("llama")), DeviceCache(2**30)
    room.add(*CHUNKS)
    on_device(room, LateCopies(fails_at=5), cache)
    with pytest.raises(torch.OutOfMemoryError):
        room.run(CHUNKS, Reuse())
    assert cache.stats().used_bytes == 0
    assert room.store.stats().open_blocks == 0
    on_device(room, LateCopies(), cache)
    room.run(CHUNKS, Reuse())
    assert cache.stats().blocks == 3


def test_a_chunk_that_a_window_spares_layers_is_not_admitted(tiny):
    room, cache = Room(tiny("mistral-window", sliding_window=32)), DeviceCache(2**30)
    on_device(room, LateCopies(), cache)
    room.run(CHUNKS, Reuse())
    assert cache.stats().blocks == 2
    assert room.run(CHUNKS, Reuse()).tiers == ("ram", "device", "device")


def test_another_prefix_or_namespace_is_another_chunk(tiny):
    """Keys are the store's: what was computed behind another prefix does not answer."""
    folder, cache = tiny("llama"), DeviceCache(2**30)
    for prefix in (token_ids(6, seed=1), token_ids(7, seed=2)):
        room = on_device(Room(folder, corpus_prefix=prefix), LateCopies(), cache)
        assert room.run(CHUNKS, Reuse()).tiers == ("computed",) * 3
    assert cache.stats().blocks == 6


# ---- the engine ----------------------------------------------------------------------------------


def test_an_engine_with_a_device_cache(tiny, tmp_path, caplog):
    """On the CPU it works for real: the second answer opens no block of the store."""
    from tests.engine.test_answers import ask, open_engine

    caplog.set_level(logging.WARNING)
    with open_engine(tiny("qwen3", "llama3"), tmp_path / "plain") as plain:
        expected = ask(plain)
        assert plain.device_cache is None
    with open_engine(tiny("qwen3", "llama3"), tmp_path / "home", device_bytes=2**24) as engine:
        first = ask(engine)
        reads = [(tier.name, tier.hits) for tier in engine.stats().tiers]
        second = ask(engine)
        assert [source.tier for source in first.sources] == ["computed"] * 3
        assert [source.tier for source in second.sources] == ["device"] * 3
        assert [(tier.name, tier.hits) for tier in engine.stats().tiers] == reads
        assert first.token_ids == second.token_ids == expected.token_ids
        assert engine.device_cache.stats().hits == 3
        assert ask(engine, strategy="full").token_ids
        assert engine.device_cache.stats().hits == 3
    assert engine.device_cache.stats().used_bytes == 0
    assert not caplog.records
