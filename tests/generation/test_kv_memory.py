"""Memory of KV caches that goes from one request to the next."""

from __future__ import annotations

import gc

import pytest
import torch

from kvrag.generation.kv_cache import KVCache
from kvrag.generation.kv_memory import KVMemory
from tests.store.doubles import in_threads

CPU = torch.device("cpu")


def test_memory_comes_back_with_the_last_view():
    memory = KVMemory()
    whole = memory.empty((3, 4), torch.float32)
    assert whole.is_contiguous()
    whole.copy_(torch.arange(12).view(3, 4))
    place, view = whole.data_ptr(), whole[1]
    del whole
    assert memory.idle_bytes == 0
    assert view.tolist() == [4, 5, 6, 7]
    del view
    assert memory.idle_bytes == 48
    again = memory.empty((2, 3), torch.float64)
    assert again.data_ptr() == place
    assert memory.idle_bytes == 0
    # Two at a time never share.
    assert memory.empty((2, 3), torch.float64).data_ptr() != place


def test_the_smallest_piece_that_suffices_is_taken():
    memory = KVMemory()
    held = [memory.empty((n,), torch.uint8) for n in (100, 50, 70)]
    places = [each.data_ptr() for each in held]
    held.clear()
    assert memory.empty((60,), torch.uint8).data_ptr() == places[2]
    assert memory.empty((101,), torch.uint8).data_ptr() not in places


def test_no_more_is_kept_than_the_limit_and_the_largest_stay():
    memory = KVMemory(limit_bytes=120)
    held = [memory.empty((n,), torch.uint8) for n in (30, 100, 15, 121)]
    held.clear()
    assert memory.idle_bytes == 115
    assert memory.empty((0,), torch.float32).shape == (0,)
    with pytest.raises(ValueError, match="-1"):
        KVMemory(-1)


def test_closing_frees_what_is_idle_and_what_comes_back():
    memory = KVMemory()
    lent, idle = memory.empty((8,), torch.uint8), memory.empty((8,), torch.uint8)
    del idle
    assert memory.idle_bytes == 8
    memory.close()
    assert memory.idle_bytes == 0
    lent.fill_(1)
    assert lent.sum() == 8
    del lent
    assert memory.idle_bytes == 0


def test_memory_that_comes_back_while_memory_is_taken():
    """The garbage collector may run in any line, and so a tensor may end there."""
    memory = KVMemory()

    class Cycle:
        def __init__(self):
            self.tensor, self.itself = memory.empty((1000,), torch.uint8), self

    gc.disable()
    try:
        for _ in range(200):
            Cycle()
        gc.set_threshold(1)
        gc.enable()
        held = [memory.empty((n,), torch.uint8) for n in range(900, 1000)]
    finally:
        gc.set_threshold(700, 10, 10)
        gc.enable()
    assert len({each.data_ptr() for each in held}) == len(held)


def test_threads_never_get_the_same_memory():
    memory, wrong = KVMemory(), []

    def work(number):
        for _ in range(300):
            mine = memory.empty((4096,), torch.uint8)
            mine.fill_(number)
            if not bool((mine == number).all()):
                wrong.append(number)

    in_threads(4, work)
    assert not wrong
    # Each thread holds one while it asks for the next.
    assert 0 < memory.idle_bytes <= 2 * 4 * 4096


def test_caches_pass_their_memory_on(tiny):
    from kvrag.models.source import open_model

    folder = tiny("llama")
    config = open_model(str(folder), folder, dtype=torch.float64).decoder.config
    memory = KVMemory()

    def cache(capacity):
        return KVCache(config, capacity, dtype=torch.float64, device=CPU, memory=memory)

    first = cache(20)
    nbytes = first.nbytes
    first.reserve(25)
    assert memory.idle_bytes == nbytes
    grown = first.nbytes
    del first
    assert memory.idle_bytes == nbytes + grown
    smaller = cache(18)
    assert smaller.nbytes < nbytes
    assert memory.idle_bytes == grown
