"""The memory tier against `memcpy` of the same bytes, and what a hit takes in Python.

A hit is all layers of a block: opened, read, verified. The copy goes to memory that was written
before. What Python takes is the time of hits on blocks of the same layers with 64 bytes each, of
which hardly anything is checksums: the processor's time, since others' work is not Python's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from kvrag.bench.frame import median
from kvrag.bench.store.options import (
    Row,
    Section,
    StoreOptions,
    Target,
    check,
    get,
    make_blocks,
)
from kvrag.bench.store.turns import in_turns, ratio, timed
from kvrag.store.block import Block
from kvrag.store.ram import RamTier
from kvrag.store.tiered import TieredStore, TierSlot

__all__ = ["memory_section"]

_TINY_NBYTES = 64
_TINY_HITS = 50


def memory_section(options: StoreOptions) -> Section:
    """Measure it."""
    blocks = make_blocks(options)
    tiny = make_blocks(replace(options, blocks=1), layer_nbytes=_TINY_NBYTES)[0]
    with TieredStore([TierSlot(RamTier())]) as store:
        for block in (*blocks, tiny):
            store.put(block.header.key, block)
            check(get(store, block), block)
        taken = in_turns(
            {
                "memcpy": _copies(blocks),
                "get": lambda: timed(lambda: [get(store, block) for block in blocks]),
                "python": lambda: _processor_s(lambda: get(store, tiny), _TINY_HITS),
            },
            options.repetitions,
        )
    python_us = median([1e6 * seconds for seconds in taken.pop("python")])
    ms = {name: median([1e3 * s / len(blocks) for s in of]) for name, of in taken.items()}
    gb_s = {name: median([options.nbytes / of / 1e6]) for name, of in ms.items()}
    of_memcpy = ratio(taken["memcpy"], taken["get"])
    return Section(
        {"ms": ms, "gb_s": gb_s, "of_memcpy": of_memcpy, "python_us": python_us},
        (
            Row("memcpy", ms["memcpy"], gb_s["memcpy"]),
            Row("get, verified", ms["get"], gb_s["get"], f"{of_memcpy:.0%} of memcpy"),
            Row("Python a hit", python_us / 1e3),
        ),
        (
            Target("memory.of_memcpy", of_memcpy, 0.5),
            Target("memory.python_us", python_us, 100, at_most=True),
        ),
    )


def _copies(blocks: Sequence[Block]) -> Callable[[], float]:
    sources = [np.frombuffer(b"".join(block.segments), dtype=np.uint8) for block in blocks]
    target = np.zeros_like(sources[0])

    def copy() -> None:
        for source in sources:
            np.copyto(target, source)

    return lambda: timed(copy)


def _processor_s(work: Callable[[], object], times: int) -> float:
    """The processor's seconds of one call."""
    begun = time.thread_time()
    for _ in range(times):
        work()
    return (time.thread_time() - begun) / times
