"""A store with a real Redis that is slow, or hangs, behind memory."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest

from kvrag.config import Settings
from kvrag.store.errors import DamagedBlockError
from kvrag.store.ram import RamTier
from kvrag.store.tiered import Expected, TieredStore, TierSlot, at_once
from kvrag.tiers import tier_slots

from .doubles import FakeClock
from .helpers import FINGERPRINT, make_block, make_key, token_ids

pytestmark = pytest.mark.redis


def make_tier(url, **options):
    from kvrag.store.redis import RedisTier

    return RedisTier(url, **options)


def of_redis(store):
    return next(tier for tier in store.stats().tiers if tier.name == "redis")


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def open_block(store, name):
    return store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))


def test_a_redis_that_answers_small_things_alone_is_left_alone_longer_and_longer(proxy):
    """Each header that was found, and each trial, set the pause back to a second: for ever, every
    second query waited for a time-out.
    """
    clock, ram = FakeClock(), RamTier()
    slots = [TierSlot(ram), TierSlot(make_tier(proxy.url, timeout_s=0.3))]
    with TieredStore(slots, clock=clock, aside=at_once) as store:
        for name in range(12):
            store.put(make_key(name), make_block(name, segment_nbytes=40_000))
            ram.delete(make_key(name))
        proxy.largest = 20_000
        hung = []
        for name in range(12):
            clock.now += 1.5
            before = proxy.swallowed
            reader = open_block(store, name)
            if reader is not None:
                with reader, pytest.raises(DamagedBlockError):
                    reader.read(0, 2)
            hung.append(proxy.swallowed > before)
        assert 2 <= sum(hung) <= 4, hung  # with pauses of 1, 2, 4, 8 seconds
        proxy.largest = None
        clock.now += 60
        with open_block(store, 11) as reader:
            assert len(reader.read(0, 2)) == 2


# -- round trips ---------------------------------------------------------------------------------


def test_a_prompts_chunks_are_opened_in_one_round_trip(server, proxy):
    """Each was asked for by itself: 16 round trips before the first layer was asked for."""
    with make_tier(server.url) as tier:
        for name in range(16):
            tier.put(make_key(name), make_block(name))
    proxy.delay_s = 0.02
    with TieredStore([TierSlot(RamTier()), TierSlot(make_tier(proxy.url, timeout_s=5))]) as store:
        wait_for(lambda: of_redis(store).blocks == 16)
        wanted = [Expected(make_key(n), "chunk", FINGERPRINT, token_ids(n)) for n in range(17)]
        before = proxy.round_trips
        readers = store.open_many(wanted)
        assert proxy.round_trips - before == 1
        assert readers[16] is None
        for name, reader in enumerate(readers[:16]):
            with reader:
                assert reader.read(0, 2) == list(make_block(name).segments)
        # What others put there since is entered into the books, together as well.
        with make_tier(server.url) as tier:
            for name in range(20, 36):
                tier.put(make_key(name), make_block(name))
        before = proxy.round_trips
        wanted = [Expected(make_key(n), "chunk", FINGERPRINT, token_ids(n)) for n in range(20, 36)]
        readers = store.open_many(wanted)
        assert all(readers)
        assert proxy.round_trips - before == 2
        for reader in readers:
            reader.close()


def test_a_block_that_is_read_whole_takes_one_round_trip(server, proxy):
    with make_tier(server.url) as tier:
        tier.put(make_key(1), make_block(1, layers=20, segment_nbytes=5000))
    with TieredStore([TierSlot(make_tier(proxy.url, timeout_s=5))], aside=at_once) as store:
        before = proxy.round_trips
        expected = {"fingerprint": FINGERPRINT, "token_ids": token_ids(1)}
        with store.open(make_key(1), **expected, whole=True) as reader:
            assert len(reader.read(0, 20)) == 20
        assert proxy.round_trips - before == 1


def test_a_full_redis_says_so_once(server, caplog):
    """Each block was two lines of the log."""
    with server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 2_000_000)
    with TieredStore([TierSlot(RamTier()), TierSlot(make_tier(server.url))]) as store:
        names = range(20)
        for name in names:
            store.put(make_key(name), make_block(name, segment_nbytes=200_000))
        refused = of_redis(store).refused
        assert 10 < refused == of_redis(store).errors
        assert of_redis(store).healthy
        (line,) = [record.getMessage() for record in caplog.records]
        assert "maxmemory" in line
        with server.client() as client:
            client.config_set("maxmemory", 0)
        caplog.clear()
        for name in names:
            store.put(make_key(name), make_block(name, segment_nbytes=200_000))
        assert of_redis(store).refused == refused
        assert [record.getMessage() for record in caplog.records] == [
            "tier redis takes blocks again"
        ]


# -- opening -------------------------------------------------------------------------------------


def fill(server, blocks):
    """Stamps are enough to be listed, and a whole block under the first key to be read."""
    with server.client() as client:
        pipeline = client.pipeline(transaction=False)
        for name in range(1, blocks):
            pipeline.hset(f"kvrag:{make_key(name)}", mapping={"h": b"x", "s": bytes(16)})
        pipeline.execute()
    with make_tier(server.url) as tier:
        tier.put(make_key(0), make_block(0))


def test_opening_does_not_wait_for_a_walk_over_redis(server, proxy, caplog):
    """Opening filled the books first: 43 s for 20,000 blocks at 50 ms an answer."""
    fill(server, 4000)
    proxy.delay_s = 0.05
    begun = time.perf_counter()
    with TieredStore([TierSlot(RamTier()), TierSlot(make_tier(proxy.url, timeout_s=5))]) as store:
        with open_block(store, 0) as reader:  # while the walk is on
            assert reader.tier == "redis"
            assert len(reader.read(0, 2)) == 2
        assert of_redis(store).blocks < 4000
        assert time.perf_counter() - begun < 2
        proxy.delay_s = 0
        wait_for(lambda: of_redis(store).blocks == 4000)
    assert not caplog.records


def test_a_store_that_is_closed_during_the_walk_says_nothing(server, proxy, caplog):
    fill(server, 4000)
    proxy.delay_s = 0.05
    TieredStore([TierSlot(RamTier()), TierSlot(make_tier(proxy.url))]).close()
    wait_for(lambda: not any(t.name == "kvrag-aside" for t in threading.enumerate()))
    assert not caplog.records


def test_the_walk_is_made_up_for_when_redis_is_back(server):
    fill(server, 10)
    clock = FakeClock()
    server.pause()
    try:
        slots = [TierSlot(RamTier()), TierSlot(make_tier(server.url, timeout_s=0.2))]
        store = TieredStore(slots, clock=clock, aside=at_once)
    finally:
        server.resume()
    with store:
        assert of_redis(store).blocks == 0
        clock.now += 2
        store.locate([make_key(1)])
        assert of_redis(store).blocks == 10


# -- writing back --------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, server):
    return Settings(home=tmp_path / "home", disk_write="back", redis_url=server.url)


def test_a_put_that_is_written_back_does_not_wait_for_redis(server, home):
    """Redis was written to in the request, since it is not durable: a second when it hangs."""
    with TieredStore(tier_slots(home)) as store:
        store.put(make_key(0), make_block(0))
        store.flush()
        server.pause()
        try:
            begun = time.perf_counter()
            outcome = store.put(make_key(1), make_block(1))
            took = time.perf_counter() - begun
            assert (outcome.tiers, set(outcome.pending)) == (("ram",), {"disk", "redis"})
            wait_for(lambda: store.holds_durably(make_key(1)), 0.8)  # the disk waits for no Redis
        finally:
            server.resume()
        assert took < 0.5
        assert not outcome.lost
        store.flush()
    with make_tier(server.url) as tier:
        assert tier.contains(make_key(0))


def test_a_new_version_takes_the_place_of_the_old_one(server, home):
    with TieredStore(tier_slots(home)) as store, make_tier(server.url) as tier:
        for version in range(2):
            store.put(make_key(0), make_block(0, version=version))
            store.flush()
            assert tier.header(make_key(0)) == make_block(0, version=version).header


def test_closing_waits_for_the_disk_and_for_no_redis(server, home, caplog):
    home = home.model_copy(update={"redis_timeout_s": 30.0})
    store = TieredStore(tier_slots(home))
    store.put(make_key(0), make_block(0))
    store.flush()
    server.pause()
    try:
        for name in range(1, 6):
            store.put(make_key(name), make_block(name))
        begun = time.perf_counter()
        store.close()
        assert time.perf_counter() - begun < 10
    finally:
        server.resume()
    slots = tier_slots(home.model_copy(update={"redis_url": None}))
    with TieredStore(slots) as store:
        assert all(store.holds_durably(make_key(name)) for name in range(6))
    assert not caplog.records


def test_what_only_redis_will_have_is_lost(home):
    slots = tier_slots(home.model_copy(update={"disk_bytes": 0, "disk_write": "through"}))
    slots[2] = dataclasses.replace(slots[2], write="back")
    with TieredStore(slots) as store:
        outcome = store.put(make_key(1), make_block(1))
        assert (outcome.pending, outcome.lost) == (("redis",), True)
