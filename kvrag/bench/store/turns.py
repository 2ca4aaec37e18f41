"""Contestants that take turns, so that a busy machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from kvrag.bench.frame import median

__all__ = ["in_turns", "ratio", "timed"]


def in_turns(
    contestants: Mapping[str, Callable[[], float]], repetitions: int
) -> dict[str, list[float]]:
    """What each contestant returns, its seconds, once a turn.

    A first turn is not counted: it connects, opens, compiles. Who comes second finds things in
    caches, so every other turn goes backwards.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repetitions + 1):
        names = list(contestants)[:: 1 if turn % 2 else -1]
        for name in names:
            taken = contestants[name]()
            if turn:
                seconds[name].append(taken)
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds that it took."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within each turn."""
    return median([a / b for a, b in zip(above, below, strict=True)])
