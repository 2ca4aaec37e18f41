"""Slow and obvious forms of the kernels, for tests and benchmarks to hold the fast ones against."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`kernels.attention.attention` with a dense mask over all rows and keys."""
    heads, n, dim = q.shape
    group = heads // k.shape[0]
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    keys = torch.arange(k.shape[1], device=q.device)
    rows = positions.to(q.device)[:, None]
    visible = keys <= rows
    if window is not None:
        visible &= rows - keys < window
    scores = (q @ k.transpose(1, 2)) * (dim**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    mixed: Tensor = weights @ v
    return mixed.transpose(0, 1).reshape(n, heads * dim)
