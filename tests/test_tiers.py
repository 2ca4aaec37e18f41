"""Which memory the tiers of a home take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvrag import Settings, tiers
from kvrag.store.ram import RamTier
from tests.store.helpers import make_block, make_key, whole_bytes


@pytest.mark.parametrize(("device", "pins"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_memory_beside_a_gpu_is_pinned(tmp_path, monkeypatch, device, pins):
    asked = []

    def pinned(nbytes):
        asked.append(nbytes)
        return memoryview(bytearray(nbytes))

    monkeypatch.setattr(tiers, "_pinned", pinned)
    slots = tiers.tier_slots(Settings(home=tmp_path, device=device))
    ram = slots[0].tier
    assert isinstance(ram, RamTier)
    ram.put(make_key(1), make_block(1))
    assert asked == ([make_block(1).nbytes] if pins else [])
    header = ram.header(make_key(1))
    found = ram.segments(make_key(1), 0, len(header.segments))
    assert b"".join(found) == whole_bytes(make_block(1))[header.segments[0].offset :]
    for slot in slots:
        slot.tier.close()


def test_where_nothing_can_be_pinned_memory_is_ordinary(monkeypatch):
    def refuses(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuses)
    memory = tiers._pinned(4097)
    assert len(memory) == 4097
    memory[:] = b"x" * 4097
    assert np.frombuffer(memory, np.uint8).ctypes.data % 4096 == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_memory():
    memory = tiers._pinned(5000)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    assert tensor.is_pinned()
    assert tensor.data_ptr() % 4096 == 0
