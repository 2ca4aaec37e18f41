"""Which memory the tiers of a home take, and which of their rules hold in a home set apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvrag import Settings, tiers
from kvrag.store.ram import RamTier
from tests.store.helpers import make_block, make_key, whole_bytes


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
