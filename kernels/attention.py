"""Exact attention of sorted, possibly scattered query rows, by blocks of rows (CPU).

A block of rows sees only the keys up to its last position, so nothing is computed for keys that
no row of the block may see, and a mask is needed on the block's tail alone. The rows of a query
group are stacked behind their KV head, so K and V are never repeated.

Scores of one block and one KV head are computed in place in one buffer that stays in the cache:
fresh buffers of that size come from the operating system page by page, which costs more than the
products do.
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
        positions: int64 (n,), ascending, each below m.
        window: with a window, also `positions[i] - j < window`.

    Returns:
        (n, heads * head_dim), the dtype of `q`.
    """
    heads, n, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    grouped = (q * dim**-0.5).view(kv_heads, group, n, dim)
    if n == 1:
        return _one_row(grouped, k, v, int(positions), window)
    out = q.new_empty(n, kv_heads, group, dim)
    at = positions.tolist()
    scratch = q.new_empty(min(n, BLOCK_ROWS) * group * (at[-1] + 1))
    for start in range(0, n, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, n)
        rows, first, end = stop - start, at[start], at[stop - 1] + 1
        low = 0 if window is None else max(0, first - window + 1)
        scores = scratch[: group * rows * (end - low)].view(group * rows, end - low)
        hidden = _hidden(positions[start:stop], first, low, end, window)
        for head in range(kv_heads):
            block = grouped[head, :, start:stop].reshape(group * rows, dim)
            torch.mm(block, k[head, low:end].t(), out=scores)
            for tail, mask in hidden:
                scores.view(group, rows, -1)[..., tail:].masked_fill_(mask, float("-inf"))
            torch.softmax(scores, dim=-1, out=scores)
            mixed = torch.mm(scores, v[head, low:end]).view(group, rows, dim)
            out[start:stop, head] = mixed.transpose(0, 1)
    return out.view(n, heads * dim)


def _one_row(grouped: Tensor, k: Tensor, v: Tensor, position: int, window: int | None) -> Tensor:
    """Decoding: no mask is needed, and one batched product serves all heads."""
    low = 0 if window is None else max(0, position - window + 1)
    scores = torch.bmm(grouped.squeeze(2), k[:, low : position + 1].transpose(1, 2))
    return torch.bmm(scores.softmax(dim=-1), v[:, low : position + 1]).view(1, -1)


def _hidden(
    positions: Tensor, first: int, low: int, end: int, window: int | None
) -> list[tuple[int, Tensor]]:
    """What rows may not see: (first column, mask (rows, columns from there on)).

    Only keys behind the block's first row can be in the future of any.
    """
    keys = torch.arange(low, end, device=positions.device)
    rows = positions[:, None]
    tail = first + 1 - low
    hidden = [(tail, keys[tail:] > rows)] if tail < len(keys) else []
    if window is not None:
        hidden.append((0, rows - keys >= window))
    return hidden
