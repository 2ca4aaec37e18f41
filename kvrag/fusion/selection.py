"""What a selector says: which rows go on, and how it judged all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Choice", "best", "share"]


@dataclass(frozen=True, slots=True)
class Choice:
    """rows: int64, ascending, indices of those chosen. scores: (n,), one for each row judged."""

    rows: Tensor
    scores: Tensor


def best(scores: Tensor, count: int) -> Choice:
    """The `count` rows of highest score, or all if there are no more."""
    if count >= len(scores):
        return Choice(torch.arange(len(scores), device=scores.device), scores)
    return Choice(torch.topk(scores, count).indices.sort().values, scores)


def share(ratio: float, count: int) -> int:
    """`ratio` of `count` rows, rounded; a ratio above 0 is at least one row."""
    return max(1, round(ratio * count)) if ratio > 0 and count else 0
