"""The tiers of a home: which memory they take, and which rules reach which of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvrag import Settings, tiers
from kvrag.errors import SettingsError
from kvrag.store.ram import RamTier
from kvrag.store.tiered import TieredStore
from tests.store.helpers import FINGERPRINT, make_block, make_key, token_ids, whole_bytes


@pytest.mark.parametrize(("device", "pins"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_memory_beside_a_gpu_is_pinned(tmp_path, monkeypatch, device, pins):
    asked = []

    def pinned(nbytes, device):
        asked.append((nbytes, device))
        return memoryview(bytearray(nbytes))

    monkeypatch.setattr(tiers, "pinned_memory", pinned)
    slots = tiers.tier_slots(Settings(home=tmp_path, device=device))
    ram = slots[0].tier
    assert isinstance(ram, RamTier)
    ram.put(make_key(1), make_block(1))
    assert asked == ([(make_block(1).nbytes, device)] if pins else [])
    header = ram.header(make_key(1))
    found = ram.segments(make_key(1), 0, len(header.segments))
    assert b"".join(found) == whole_bytes(make_block(1))[header.segments[0].offset :]
    for slot in slots:
        slot.tier.close()


def test_a_home_set_apart_keeps_all_that_is_put():
    """A new rule of the store is to be named there, or here with the reason why it stays."""
    stays = {
        "ram_bytes",  # how much memory may be taken, and the disk holds what does not fit
        "disk_fsync",  # how long storing takes, which is measured
        # which Redis would be used, and there is none
        "redis_bytes",
        "redis_ttl_s",
        "redis_connect_timeout_s",
        "redis_timeout_s",
        "redis_connections",
        "redis_prefix",
    }
    rooms = ("ram_", "disk_", "namespace_", "ttl_", "redis_")
    rules = {name for name in Settings.model_fields if name.startswith(rooms)} - stays
    strange = {
        "ram_reserved": 0.5,
        "ram_policy": "lfu",
        "disk_policy": "lfu",
        "ram_admission": "second-use",
        "disk_admission": "second-use",
        "disk_write": "back",
        "redis_url": "redis://here",
    }
    settings = Settings(k=9, **{name: strange.get(name, 7) for name in rules})
    apart = settings.apart(Path("/elsewhere"), controller=False)
    for name in rules:
        assert getattr(apart, name) == Settings.model_fields[name].default, name
        assert getattr(apart, name) != getattr(settings, name)
    assert (apart.home, apart.k, apart.controller) == (Path("/elsewhere"), 9, False)


def test_a_home_set_apart_is_not_given_the_environments_rules(monkeypatch):
    monkeypatch.setenv("KVRAG_DISK_BYTES", "5")
    monkeypatch.setenv("KVRAG_TTL_S", "5")
    apart = Settings().apart(Path("/elsewhere"))
    assert (apart.disk_bytes, apart.ttl_s) == (None, None)


# -- the rules of a home, in Redis too -------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    from tests.store.redis_server import RedisServer

    with RedisServer(tmp_path / "redis") as server:
        yield server


def ttl_in_redis_s(server, home, **settings):
    with TieredStore(tiers.tier_slots(Settings(home=home, redis_url=server.url, **settings))) as s:
        s.put(make_key(1), make_block(1))
    with server.client() as client:
        return client.pttl(f"kvrag:{make_key(1)}") / 1000


@pytest.mark.redis
def test_what_nobody_used_ends_in_redis_too(server, tmp_path):
    """`ttl_s` reached memory and disk alone: the copy in Redis went on answering."""
    settings = Settings(home=tmp_path / "home", ttl_s=1, redis_url=server.url, redis_ttl_s=600)
    with TieredStore(tiers.tier_slots(settings)) as store:
        store.put(make_key(1), make_block(1))
        time.sleep(3.1)  # by Redis's own clock, which counts whole seconds
        opened = store.open(make_key(1), fingerprint=FINGERPRINT, token_ids=token_ids(1))
        assert opened is None
        assert [tier.expired for tier in store.stats().tiers] == [1, 1, 1]


@pytest.mark.redis
def test_redis_itself_ends_what_no_process_knows_of_any_more(server, tmp_path):
    assert 50 < ttl_in_redis_s(server, tmp_path / "one", ttl_s=60) <= 60
    assert 590 < ttl_in_redis_s(server, tmp_path / "two", ttl_s=60, redis_ttl_s=600) <= 600
    assert ttl_in_redis_s(server, tmp_path / "three", redis_ttl_s=1e9) > 9e8
    assert ttl_in_redis_s(server, tmp_path / "four") < 0  # it has none


@pytest.mark.parametrize("name", ["ttl_s", "redis_ttl_s"])
@pytest.mark.parametrize("value", [0, 1.1e9, 1e17, float("inf"), float("nan")])
def test_a_time_to_live_that_redis_would_not_take_is_refused(name, value):
    """Redis refused the number at every put, which was taken for an outage."""
    with pytest.raises(SettingsError, match=name):
        Settings(**{name: value})
