"""What the implementations of one kernel agree on before they calculate."""

from __future__ import annotations

import torch

__all__ = ["counted_rows", "wide_dtype"]


def counted_rows(rows: slice, n: int) -> range:
    """Which of `n` rows the slice names.

    Raises:
        ValueError: the slice has a step.
    """
    if rows.step not in (None, 1):
        raise ValueError(f"rows is {rows!r}; it must be a slice without a step")
    return range(n)[rows]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over many numbers of `dtype` are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32
