"""Which is the cheapest tier that still hides its delay (CacheBlend, arXiv 2405.16444, 5.1)?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvrag.errors import InputError

__all__ = ["TierAdvice", "TierCheck", "TierPrice"]


@dataclass(frozen=True, slots=True)
class TierPrice:
    """A tier that blocks could lie in.

    bytes_per_s: None for what was measured. price: of a gigabyte (1e9 bytes) a month, in any
    currency; a tier without one is judged, but not chosen.

    Raises:
        InputError: a number is not finite, or too small.
    """

    name: str
    bytes_per_s: float | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.bytes_per_s is not None and not 0 < self.bytes_per_s < math.inf:
            raise InputError(f"tier {self.name!r} has {self.bytes_per_s} bytes/s; give more than 0")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise InputError(f"tier {self.name!r} costs {self.price}; give 0 or more")


@dataclass(frozen=True, slots=True)
class TierCheck:
    """Seconds. load_s: of all bytes. stall_s: what computing does not hide of it.

    hides: whether that is at most a tenth of the time to the first token. All but the first two are
    None for a tier that was not measured.
    """

    name: str
    price: float | None
    bytes_per_s: float | None
    load_s: float | None
    stall_s: float | None
    ttft_s: float | None
    hides: bool | None


@dataclass(frozen=True, slots=True)
class TierAdvice:
    """choice: name of the cheapest tier that hides its delay; None if none does or has a price.

    nbytes: of the prompt's KV. compute_s, full_s: seconds of the strategy's computing, and of full
    prefill.
    """

    choice: str | None
    tokens: int
    nbytes: int
    strategy: str
    ratio: float
    compute_s: float
    full_s: float
    tiers: tuple[TierCheck, ...]


def cheapest(checks: tuple[TierCheck, ...]) -> str | None:
    """The name of the cheapest that hides its delay; of equal prices, of the one given first."""
    priced = [(c.price, i) for i, c in enumerate(checks) if c.hides and c.price is not None]
    return checks[min(priced)[1]].name if priced else None
