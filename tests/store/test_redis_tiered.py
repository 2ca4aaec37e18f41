"""A store with a real Redis that is slow, or hangs, behind memory."""

from __future__ import annotations

import time

import pytest

from kvrag.store.errors import DamagedBlockError
from kvrag.store.ram import RamTier
from kvrag.store.tiered import TieredStore, TierSlot

from .doubles import FakeClock, at_once
from .helpers import FINGERPRINT, make_block, make_key, token_ids
from .proxy import Proxy

pytestmark = pytest.mark.redis


@pytest.fixture
def server(tmp_path):
    from .redis_server import RedisServer

    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def proxy(server):
    with Proxy(server.port) as proxy:
        yield proxy


def make_tier(url, **options):
    from kvrag.store.redis import RedisTier

    return RedisTier(url, **options)


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
        waited = []
        for name in range(12):
            clock.now += 1.5
            begun = time.perf_counter()
            reader = open_block(store, name)
            if reader is not None:
                with reader, pytest.raises(DamagedBlockError):
                    reader.read(0, 2)
            waited.append(time.perf_counter() - begun)
        hung = [seconds > 0.25 for seconds in waited]
        assert 2 <= sum(hung) <= 4, waited  # with pauses of 1, 2, 4, 8 seconds
        proxy.largest = None
        clock.now += 60
        with open_block(store, 11) as reader:
            assert len(reader.read(0, 2)) == 2
