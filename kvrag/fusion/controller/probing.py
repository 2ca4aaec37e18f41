"""When loading is tried again while full prefill stands in for it, for each kind of request.

A probe is a request like any other, that loads as it was asked to: only so do blocks get into
faster tiers. Each that disappoints makes the next one rarer.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

__all__ = ["Probe", "Probing"]

#: Every so many requests of a kind one loads: at first, and at the rarest.
SHORTEST, LONGEST = 4, 64
#: A probe that came nearer to full prefill than foreseen by this share shows that something has
#: become better, and is no noise.
NEARER = 0.5


class Probe(NamedTuple):
    """A request that loads although that was foreseen to be slower. full_s: than this, seconds."""

    kind: Hashable
    full_s: float


class Probing:
    """Counts requests that full prefill would answer, by kind. Not thread-safe."""

    def __init__(self) -> None:
        self._waits: dict[Hashable, _Wait] = {}

    def due(self, kind: Hashable) -> bool:
        """Count a request; whether it is to load all the same."""
        wait = self._waits.setdefault(kind, _Wait())
        wait.passed += 1
        if wait.passed < wait.every:
            return False
        wait.passed = 0
        return True

    def tried(self, probe: Probe, *, predicted_s: float, seconds: float) -> None:
        """A probe came to its end: it took `seconds` where `predicted_s` were foreseen."""
        wait = self._waits.get(probe.kind)
        if wait is None:
            return  # forgotten while it ran
        if seconds < probe.full_s:
            wait.every = 1  # one measurement far off is doubted: the next one is to confirm it
        elif seconds - probe.full_s < (1 - NEARER) * (predicted_s - probe.full_s):
            wait.every = SHORTEST
        else:
            wait.every = min(max(SHORTEST, 2 * wait.every), LONGEST)

    def forget(self, kind: Hashable) -> None:
        """Requests of the kind load again."""
        self._waits.pop(kind, None)

    def clear(self) -> None:
        """Forget every kind."""
        self._waits.clear()


class _Wait:
    """One request in `every` loads; so many have passed since the last one that did."""

    def __init__(self) -> None:
        self.passed, self.every = 0, SHORTEST
