"""When a request's reads ran: how long any was under way, and what each tier delivered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["ReadTimes", "TierRead"]


class TierRead(NamedTuple):
    """What one tier delivered to one request.

    nbytes: encoded bytes read from it. seconds: wall time with at least one of these reads under
    way, verifying and decoding included: several at a time count once.
    """

    nbytes: int
    seconds: float


class ReadTimes:
    """Begin and end of each read, in seconds of one clock. Not thread-safe."""

    def __init__(self) -> None:
        self._reads: list[tuple[str, int, float, float]] = []

    def add(self, tier: str, nbytes: int, begun: float, ended: float) -> None:
        """A read. `nbytes` is 0 where another request had read it, or none could be read."""
        self._reads.append((tier, nbytes, begun, ended))

    @property
    def busy_s(self) -> float:
        """Seconds during which at least one read was under way."""
        return _covered((begun, ended) for _, _, begun, ended in self._reads)

    def by_tier(self) -> dict[str, TierRead]:
        """The reads that took bytes from a tier, by its name."""
        reads = [read for read in self._reads if read[1]]
        return {
            tier: TierRead(
                nbytes=sum(nbytes for name, nbytes, _, _ in reads if name == tier),
                seconds=_covered((begun, end) for name, _, begun, end in reads if name == tier),
            )
            for tier in sorted({name for name, _, _, _ in reads})
        }


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begun, ended in sorted(spans):
        total += max(0.0, ended - max(begun, reached))
        reached = max(reached, ended)
    return total
