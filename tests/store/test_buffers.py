"""Memory that is used again: never while somebody can see it."""

from __future__ import annotations

import gc
import mmap
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kvrag.store.buffers import BufferPool

NBYTES = 2**18


def address(view):
    return np.frombuffer(view, dtype=np.uint8).ctypes.data


def test_memory_comes_back_when_its_last_view_is_gone():
    pool = BufferPool(2**20)
    view = pool.take(NBYTES)
    where = address(view)
    assert where % 4096 == 0
    part = view[4096:8192]
    part_of_part = torch.frombuffer(part[16:], dtype=torch.uint8)
    del view, part
    assert pool.kept_nbytes == 0
    assert address(pool.take(NBYTES)) != where
    del part_of_part
    assert pool.kept_nbytes >= NBYTES
    views = [pool.take(NBYTES), pool.take(NBYTES)]
    assert where in map(address, views)


def test_what_is_lent_is_never_lent_again():
    pool = BufferPool(2**24)
    views = [pool.take(NBYTES) for _ in range(8)]
    for number, view in enumerate(views):
        view[:] = bytes([number]) * NBYTES
    assert all(view == bytes([number]) * NBYTES for number, view in enumerate(views))


def test_no_more_is_kept_than_allowed():
    pool = BufferPool(2 * NBYTES)
    views = [pool.take(NBYTES) for _ in range(5)]
    del views
    assert pool.kept_nbytes == 2 * NBYTES
    view = pool.take(NBYTES)
    pool.clear()
    assert pool.kept_nbytes == 0
    del view
    assert pool.kept_nbytes == 0


def test_the_smallest_that_fits_is_taken_and_little_is_wasted():
    pool = BufferPool(2**24)
    sizes = (NBYTES, NBYTES + 4096, 2 * NBYTES)
    views = {size: pool.take(size) for size in sizes}
    places = {size: address(view) for size, view in views.items()}
    views.clear()
    assert address(pool.take(NBYTES - 4096)) == places[NBYTES]  # and it is back at once
    middle = pool.take(NBYTES + 1)
    assert address(middle) == places[NBYTES + 4096]
    assert len(middle) == NBYTES + 1
    assert address(pool.take(2**17)) not in places.values()


def test_views_that_end_while_the_pool_is_busy():
    """A cycle may be collected at any instant, also in a thread that holds the pool's lock."""

    class Cycle:
        def __init__(self, view):
            self.view, self.me = view, self

    pool, problems = BufferPool(2**22), []

    def use(number):
        try:
            for turn in range(200):
                view = pool.take(NBYTES)
                view[0] = view[-1] = number
                Cycle(pool.take(NBYTES))
                if turn % 20 == 0:
                    gc.collect()
                assert view[0] == view[-1] == number
        except BaseException as exc:
            problems.append(exc)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not problems
    gc.collect()
    assert pool.kept_nbytes == 2**22
    assert not pool._lent


def flags_at(place):
    """The flags of the mapping that holds the address."""
    inside, lines = False, Path("/proc/self/smaps").read_text().splitlines()
    for line in lines:
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= place < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
@pytest.mark.parametrize(
    ("nbytes", "huge_nbytes"),
    [
        (2**21 - 2**17, 2**21),
        (2**21, 2**21),
        (2**21 + 1, 2**21),
        (3 * 2**21 - 300_000, 3 * 2**21),
        (3 * 2**21 + 2**20 - 4096, 3 * 2**21),
    ],
)
def test_large_memory_is_asked_for_in_huge_pages(nbytes, huge_nbytes):
    """And no more of it than an eighth too much."""
    pool = BufferPool(2**26, huge=True)
    view = pool.take(nbytes)
    view[:] = bytes([7]) * nbytes
    place = address(view)
    assert len(view) == nbytes
    assert place % 2**21 == 0
    assert "hg" in flags_at(place)
    assert "hg" in flags_at(place + huge_nbytes - 1)
    assert "hg" not in flags_at(place + huge_nbytes)
    del view
    assert pool.kept_nbytes == max(nbytes, huge_nbytes) <= nbytes * 8 / 7
    assert address(pool.take(nbytes - 4096)) == place


@pytest.mark.parametrize("huge", [False, True])
def test_memory_that_is_not_to_be_had(huge):
    for nbytes in (2**46, 2**62):
        with pytest.raises(MemoryError):
            BufferPool(0, huge=huge).take(nbytes)
