"""Pinned memory: as much as is asked for, and unpinned before it is gone."""

from __future__ import annotations

import contextlib
import ctypes
import gc

import numpy as np
import pytest
import torch

from kvrag.pinned import pinned_memory
from kvrag.store.ram import RamTier
from tests.store.helpers import make_block, make_key


class FakeCuda:
    """Stands for CUDA where there is none. `pinned`: addresses and sizes; `full`: no more are."""

    def __init__(self):
        self.pinned, self.full, self.devices, self.kernels = {}, False, [], 0

    def cudaHostRegister(self, address, nbytes, flags):
        if self.full:
            return 2  # cudaErrorMemoryAllocation
        assert flags == 1
        assert address not in self.pinned
        self.pinned[address] = nbytes
        return 0

    def cudaHostUnregister(self, address):
        ctypes.string_at(address, self.pinned.pop(address))  # all of it is there still
        return 0

    @contextlib.contextmanager
    def device(self, device):
        self.devices.append(device)
        yield

    def ones(self, count, device):
        self.kernels += 1
        raise RuntimeError("CUDA error: out of memory")


@pytest.fixture
def cuda(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    monkeypatch.setattr(torch, "ones", cuda.ones)
    return cuda


def test_it_takes_what_is_asked_for_and_goes_with_its_last_view(cuda):
    """Torch's took 8 MiB for 5, and kept them when the block was evicted."""
    memory = pinned_memory(5 * 2**20 + 1, "cuda:1")
    assert len(memory) == 5 * 2**20 + 1
    address = np.frombuffer(memory, np.uint8).ctypes.data
    assert address % 4096 == 0
    assert cuda.pinned == {address: 5 * 2**20 + 1}
    assert cuda.devices == ["cuda:1"]
    memory[:] = b"x" * len(memory)
    tensor = torch.frombuffer(memory[4096:8192], dtype=torch.uint8)[7:]
    del memory
    gc.collect()
    assert cuda.pinned
    assert tensor.tolist() == [ord("x")] * 4089
    del tensor
    gc.collect()
    assert not cuda.pinned


def test_an_evicted_block_is_unpinned_when_nobody_reads_it(cuda):
    ram = RamTier(allocate=lambda nbytes: pinned_memory(nbytes, "cuda"))
    for name in range(3):
        ram.put(make_key(name), make_block(name))
    assert sum(cuda.pinned.values()) == ram.nbytes
    views = ram.segments(make_key(0), 0, 2)
    for name in range(2):
        ram.delete(make_key(name))
    assert len(cuda.pinned) == 2
    assert views == list(make_block(0).segments)
    del views
    assert sum(cuda.pinned.values()) == ram.nbytes == make_block(2).nbytes


def test_where_nothing_can_be_pinned_memory_is_ordinary_and_no_query_sees_the_error(cuda):
    cuda.full = True
    memory = pinned_memory(4097, "cuda")
    assert len(memory) == 4097
    memory[:] = b"x" * 4097
    assert np.frombuffer(memory, np.uint8).ctypes.data % 4096 == 0
    assert cuda.kernels == 1
    del memory
    gc.collect()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_by_cuda():
    memory = pinned_memory(5000, "cuda")
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    assert tensor.is_pinned()
    assert tensor[4096:].is_pinned()
    assert tensor.data_ptr() % 4096 == 0
