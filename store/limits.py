"""How much one tier may hold, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LONGEST_TTL_S", "Limits"]

#: Thirty years. Redis counts milliseconds from 1970 in 63 bits, and refuses what goes beyond.
LONGEST_TTL_S = 1e9


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a tier may hold. Raises `ValueError`.

    `nbytes`: of all blocks (None: no limit); `namespace_nbytes`: of those of one namespace;
    `reserved_share`: the part of `nbytes` that blocks which no corpus refers to cannot take from
    those which one does; `ttl_s`: seconds after its last use when a block of the former kind ends.
    """

    nbytes: int | None = None
    namespace_nbytes: int | None = None
    reserved_share: float = 0.0
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("nbytes", "namespace_nbytes", "ttl_s"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"the limit {name} must be at least 0, or None, got {value}")
        if not 0 <= self.reserved_share <= 1:
            raise ValueError(f"reserved_share must be from 0 to 1, got {self.reserved_share}")

    @property
    def reserved_nbytes(self) -> float:
        return self.reserved_share * (self.nbytes or 0)
