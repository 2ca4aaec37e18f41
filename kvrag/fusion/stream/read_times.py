"""When a request's reads ran: how long any was under way, and what each tier delivered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Amounts", "Read", "ReadTimes", "TierRead", "add_amounts"]

#: When something began and ended.
_Span = tuple[float, float]


class Amounts(NamedTuple):
    """What is read of a tier. chunks: how many are begun, as far as the tier must wait for them.

    nbytes: encoded bytes that it must wait for; cached: those that lie in memory already.
    """

    chunks: float = 0.0
    nbytes: float = 0.0
    cached: float = 0.0


def add_amounts(
    sums: list[float], nbytes: int, cached_share: float | None, *, begins: bool
) -> None:
    """Add one read to the sums of `Amounts`. begins: whether it is the first of its chunk."""
    share = cached_share or 0.0
    sums[0] += (1 - share) * begins
    sums[1] += (1 - share) * nbytes
    sums[2] += share * nbytes


class TierRead(NamedTuple):
    """What one tier delivered to one request.

    nbytes: encoded bytes read from it. seconds: wall time with at least one of these reads under
    way, verifying and decoding included: several at a time count once. first, first_s: the share of
    layer 0, for which all others wait; rest, rest_s: all others, and rest_waited_s what of their
    time the request waited for loading and computed nothing.
    """

    nbytes: int
    seconds: float
    first: Amounts
    first_s: float
    rest: Amounts
    rest_s: float
    rest_waited_s: float


class Read(NamedTuple):
    """One read of one chunk: when it ran, in seconds of a clock.

    nbytes: 0 where another request had read it, or none could be read. first: whether it is layer
    0. cached_share: of its block, before anything of it was read; None where that is not known.
    """

    tier: str
    nbytes: int
    begun: float
    ended: float
    first: bool = False
    cached_share: float | None = None


class ReadTimes:
    """All reads of a request, and when it waited for them. Not thread-safe."""

    def __init__(self) -> None:
        self._reads: list[Read] = []
        self._waits: list[_Span] = []

    def add(self, read: Read) -> None:
        self._reads.append(read)

    def waited(self, begun: float, ended: float) -> None:
        """The request waited for loading; times on the reads' clock."""
        self._waits.append((begun, ended))

    @property
    def busy_s(self) -> float:
        """Seconds during which at least one read was under way."""
        return _length(_union(_spans(self._reads)))

    def by_tier(self) -> dict[str, TierRead]:
        """The reads that took bytes from a tier, by its name."""
        tiers: dict[str, list[Read]] = {}
        for read in self._reads:
            if read.nbytes:
                tiers.setdefault(read.tier, []).append(read)
        return {tier: _together(tiers[tier], self._waits) for tier in sorted(tiers)}


def _together(reads: list[Read], waits: list[_Span]) -> TierRead:
    first, rest = [0.0] * 3, [0.0] * 3
    for read in reads:
        part = first if read.first else rest
        add_amounts(part, read.nbytes, read.cached_share, begins=read.first)
    first_s = _length(_union(_spans(read for read in reads if read.first)))
    others = _union(_spans(read for read in reads if not read.first))
    return TierRead(
        nbytes=sum(read.nbytes for read in reads),
        seconds=_length(_union(_spans(reads))),
        first=Amounts(*first),
        first_s=first_s,
        rest=Amounts(*rest),
        rest_s=_length(others),
        rest_waited_s=_common(others, _union(waits)),
    )


def _spans(reads: Iterable[Read]) -> list[_Span]:
    return [(read.begun, read.ended) for read in reads]


def _union(spans: Iterable[_Span]) -> list[_Span]:
    """The same times in ascending spans that do not overlap."""
    union: list[_Span] = []
    for begun, ended in sorted(spans):
        if union and begun <= union[-1][1]:
            union[-1] = (union[-1][0], max(ended, union[-1][1]))
        else:
            union.append((begun, ended))
    return union


def _length(union: Iterable[_Span]) -> float:
    return sum(ended - begun for begun, ended in union)


def _common(some: Sequence[_Span], others: Sequence[_Span]) -> float:
    """Length of what two unions have in common."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in some for b in others)
