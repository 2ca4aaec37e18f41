"""Where a long job is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Report", "Standing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """`done` of `total` of `what`; the total is None while it is not known. `words`: what else."""

    what: str
    done: int
    total: int | None = None
    words: str = ""


Report = Callable[[Standing], None]
