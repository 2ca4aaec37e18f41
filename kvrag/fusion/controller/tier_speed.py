"""What one tier delivers, found out from what requests read of it.

Three things are told apart. Layer 0 comes first, in small pieces that all else waits for. What a
disk must be waited for is slower, by ten times, than what the system holds of its files. And where
loading and computing share a core, a tier delivers less beside computing than to who waits for it:
counted by the clock alone, loading that never made anybody wait would seem to be slow.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvrag.fusion.controller.fit import Fit
from kvrag.fusion.controller.plan import Needed
from kvrag.fusion.stream import Amounts, TierRead

__all__ = ["TierEstimate", "TierSpeed"]

#: Fewer bytes tell more of the scheduler than of the tier.
_LEAST_NBYTES = 4 * 2**20
#: A request with a smaller share of bytes to wait for tells of those in memory.
_LEAST_SHARE = 0.05
#: Of a request's time, what is left at least for the bytes it waited for.
_LEAST_LEFT = 0.2


@dataclass(frozen=True, slots=True)
class TierEstimate:
    """What a tier delivers to who waits for it. None: not measured.

    bytes_per_s: of what it must be waited for, or of all where that cannot be told.
    cached_bytes_per_s: of what lies in memory already. latency_s: what a chunk's first byte adds.
    nbytes: measured so far.
    """

    bytes_per_s: float | None
    cached_bytes_per_s: float | None
    latency_s: float
    nbytes: int


class TierSpeed:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._cold, self._cached = _Speed(), _Speed()

    def add(self, read: TierRead) -> None:
        """What a request read."""
        if read.first.nbytes + read.rest.nbytes < _LEAST_SHARE * read.nbytes:
            self._cached.add(read._replace(first=_all(read.first), rest=_all(read.rest)))
            return
        # What of the time went to what lay in memory; unknown as long as that was never seen alone.
        first_s = self._cached.first_s(_cached(read.first)) or 0.0
        rest_s = self._cached.rest_s(_cached(read.rest)) or 0.0
        share = self._cached.beside or 1.0
        left = _left(rest_s, read.rest_waited_s + share * (read.rest_s - read.rest_waited_s))
        self._cold.add(
            read._replace(
                first=read.first._replace(cached=0),
                first_s=read.first_s * _left(first_s, read.first_s),
                rest=read.rest._replace(cached=0),
                rest_s=read.rest_s * left,
                rest_waited_s=read.rest_waited_s * left,
            )
        )

    def seconds(self, needed: Needed) -> float | None:
        """Until so much has come to who waits for it; None where nothing was measured.

        What must be waited for and was never seen is taken to be as fast as what was cached.
        """
        if not self._cold.nbytes + self._cached.nbytes:
            return None
        cold = self._cold if self._cold.nbytes else self._cached
        parts = (
            cold.first_s(needed.first._replace(cached=0)),
            cold.rest_s(needed.rest._replace(cached=0)),
            # Never seen alone, it is part of what its cold neighbours were found to take.
            self._cached.first_s(_cached(needed.first)),
            self._cached.rest_s(_cached(needed.rest)),
        )
        return sum(part for part in parts if part is not None)

    def beside(self, needed: Needed) -> float:
        """The share of its speed that it keeps beside computing, 0 to 1."""
        cold = self._cold.rest_s(needed.rest._replace(cached=0))
        cached = self._cached.rest_s(_cached(needed.rest))
        parts = [
            (seconds, speed.beside)
            for seconds, speed in ((cold, self._cold), (cached, self._cached))
            if seconds and speed.beside is not None
        ]
        total = sum(seconds for seconds, _ in parts)
        return sum(seconds * share for seconds, share in parts) / total if total else 1.0

    def knows(self, needed: Needed) -> bool:
        """Whether enough of its like was measured to act on."""
        if needed.first.nbytes + needed.rest.nbytes > 0:
            return self._cold.nbytes >= _LEAST_NBYTES
        return self._cold.nbytes + self._cached.nbytes >= _LEAST_NBYTES

    @property
    def waited(self) -> bool:
        """Whether anything was read that had to be waited for."""
        return self._cold.nbytes > 0

    @property
    def estimate(self) -> TierEstimate:
        return TierEstimate(
            bytes_per_s=self._cold.bytes_per_s,
            cached_bytes_per_s=self._cached.bytes_per_s,
            latency_s=self._cold.latency_s,
            nbytes=round(self._cold.nbytes + self._cached.nbytes),
        )


class _Speed:
    """Of one kind of bytes, which come as `Amounts.nbytes` here."""

    def __init__(self) -> None:
        self.nbytes = 0.0
        #: Seconds of layer 0, by chunks and bytes.
        self._first = Fit((1e-2, 1e-3))
        #: Bytes of the other layers, by seconds and by seconds waited: what waiting adds to a rate
        #: is no less than nothing, and nothing where measurements do not tell.
        self._rest = Fit((1e-5, 1e-3), like={1: 0})

    def add(self, read: TierRead) -> None:
        self.nbytes += read.first.nbytes + read.rest.nbytes
        if read.first_s > 0 and read.first.nbytes:
            self._first.add((read.first.chunks, read.first.nbytes), read.first_s)
        if read.rest_s > 0 and read.rest.nbytes:
            self._rest.add((read.rest_s, read.rest_waited_s), read.rest.nbytes)

    def first_s(self, wanted: Amounts) -> float | None:
        """Seconds; None if nothing was measured."""
        if not wanted.nbytes:
            return 0.0
        found = self._first.predict((wanted.chunks, wanted.nbytes))
        if found is None and (rate := self._rate) is not None:
            return wanted.nbytes / rate
        return found

    def rest_s(self, wanted: Amounts) -> float | None:
        """Seconds of who waits for it; None if nothing was measured."""
        if not wanted.nbytes:
            return 0.0
        rate = self._rate
        return self._first.predict((0, wanted.nbytes)) if rate is None else wanted.nbytes / rate

    @property
    def beside(self) -> float | None:
        rate = self._rate
        return None if rate is None else (self._rest.cost(0) or 0.0) / rate

    @property
    def bytes_per_s(self) -> float | None:
        if (rate := self._rate) is not None:
            return rate
        cost = self._first.cost(1)
        return 1 / cost if cost else None

    @property
    def latency_s(self) -> float:
        return self._first.cost(0) or 0.0

    @property
    def _rate(self) -> float | None:
        """Bytes a second of who waits; None if that was not measured."""
        return self._rest.predict((1, 1)) or None


def _cached(amounts: Amounts) -> Amounts:
    """The bytes in memory alone, as `_Speed` takes them."""
    return Amounts(0, amounts.cached, 0)


def _all(amounts: Amounts) -> Amounts:
    """All bytes as if they were in memory."""
    return Amounts(0, amounts.nbytes + amounts.cached, 0)


def _left(known_s: float, all_s: float) -> float:
    """The share of a time that is left when what is known of it is taken off."""
    return max(_LEAST_LEFT, 1 - known_s / all_s) if all_s > 0 else 1.0
