"""Exact attention of sorted, possibly scattered query rows, by blocks of rows (CPU).

A block of rows sees only the keys up to its last position, so nothing is computed for keys that
no row of the block may see, and a mask is needed on the block's tail alone. The rows of a query
group are stacked behind their KV head, so that grouped-query attention is one batched product a
block and K and V are never repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention"]

#: Rows a block: scores of a block stay in the cache, and few masked keys are computed.
BLOCK_ROWS = 64


def attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, window: int | None = None
) -> Tensor:
    """Softmax attention where row i sees the keys j with `j <= positions[i]`, exactly.

    Args:
        q: (heads, n, head_dim), rotated.
        k: (kv_heads, m, head_dim), rotated; key j stands at position j.
        v: (kv_heads, m, head_dim).
        positions: int64 (n,) on the CPU, ascending, each below m.
        window: with a window, also `positions[i] - j < window`.

    Returns:
        (n, heads * head_dim), the dtype of `q`.
    """
    heads, n, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    grouped = (q * dim**-0.5).view(kv_heads, group, n, dim)
    keys = k.transpose(1, 2)
    out = q.new_empty(n, kv_heads, group, dim)
    at = positions.tolist()
    for start in range(0, n, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, n)
        rows, first, last = stop - start, at[start], at[stop - 1]
        low = 0 if window is None else max(0, first - window + 1)
        block = grouped[:, :, start:stop].reshape(kv_heads, group * rows, dim)
        scores = torch.bmm(block, keys[:, :, low : last + 1])
        if rows > 1:
            _mask(scores.view(kv_heads, group, rows, -1), positions[start:stop], first, low, window)
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.bmm(weights, v[:, low : last + 1]).view(kv_heads, group, rows, dim)
        out[start:stop] = mixed.permute(2, 0, 1, 3)
    return out.view(n, heads * dim)


def _mask(
    scores: Tensor, positions: Tensor, first: int, low: int, window: int | None
) -> None:
    """Hide what a row may not see: only keys behind the block's first row can be in the future."""
    keys = torch.arange(low, low + scores.shape[-1], device=scores.device)
    rows = positions.to(scores.device)[:, None]
    tail = first + 1 - low
    scores[..., tail:].masked_fill_(keys[tail:] > rows, float("-inf"))
    if window is not None:
        scores.masked_fill_(rows - keys >= window, float("-inf"))
