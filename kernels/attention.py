"""Exact attention of sorted, possibly scattered query rows, by blocks of rows (CPU).

A block of rows sees only the keys from its first row's window up to its last position, so nothing
is computed for keys that no row of the block may see, and masks are needed at the block's ends
alone. The rows of a query group are stacked behind their KV head, so K and V are never repeated.

Scores of one block and one KV head are computed in place in one buffer that stays in the cache:
fresh buffers of that size come from the operating system page by page, which costs more than the
products do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["attention"]

#: Rows a block: scores of a block stay in the cache, and few masked keys are computed.
BLOCK_ROWS = 64


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention where row i sees the keys j with `j <= positions[i]`, exactly.

    Keys that no row sees are never read.

    Args:
        q: (heads, n, head_dim), rotated.
        k: (kv_heads, m, head_dim), rotated; key j stands at position j.
        v: (kv_heads, m, head_dim).
        positions: int64 (n,), ascending, each below m.
        scale: multiplies the scores; head_dim ** -0.5 if None.
        window: with a window, also `positions[i] - j < window`.

    Returns:
        (n, heads * head_dim), the dtype of `q`.
    """
    heads, n, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    grouped = (q * (dim**-0.5 if scale is None else scale)).view(kv_heads, group, n, dim)
    at = positions.tolist()
    if n == 1:
        return _one_row(grouped, k, v, at[0], window)
    out = q.new_empty(n, kv_heads, group, dim)
    blocks = list(_blocks(at, window))
    scratch = q.new_empty(
        group * max((stop - start) * (end - low) for start, stop, low, end in blocks)
    )
    for start, stop, low, end in blocks:
        rows = stop - start
        scores = scratch[: group * rows * (end - low)].view(group * rows, end - low)
        hidden = _hidden(positions[start:stop], at[start], low, end, window)
        for head in range(kv_heads):
            block = grouped[head, :, start:stop].reshape(group * rows, dim)
            torch.mm(block, k[head, low:end].t(), out=scores)
            for columns, mask in hidden:
                scores.view(group, rows, -1)[..., columns].masked_fill_(mask, float("-inf"))
            torch.softmax(scores, dim=-1, out=scores)
            mixed = torch.mm(scores, v[head, low:end]).view(group, rows, dim)
            out[start:stop, head] = mixed.transpose(0, 1)
    return out.view(n, heads * dim)


def _one_row(grouped: Tensor, k: Tensor, v: Tensor, position: int, window: int | None) -> Tensor:
    """Decoding: no mask is needed, and one batched product serves all heads."""
    low = 0 if window is None else max(0, position - window + 1)
    scores = torch.bmm(grouped.squeeze(2), k[:, low : position + 1].transpose(1, 2))
    return torch.bmm(scores.softmax(dim=-1), v[:, low : position + 1]).view(1, -1)


def _blocks(at: Sequence[int], window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(first row, behind the last row, first key, behind the last key) of each block.

    Windows of neighbours in a block touch, so that every key of a block is seen by one of its
    rows: what nobody sees may be undefined, and 0 × NaN would not be 0.
    """
    start = 0
    for row in range(1, len(at) + 1):
        full = row == len(at) or row - start == BLOCK_ROWS
        if full or (window is not None and at[row] - at[row - 1] > window):
            low = 0 if window is None else max(0, at[start] - window + 1)
            yield start, row, low, at[row - 1] + 1
            start = row


def _hidden(
    positions: Tensor, first: int, low: int, end: int, window: int | None
) -> list[tuple[slice, Tensor]]:
    """What rows may not see: (columns, mask (rows, columns)).

    Only keys behind the block's first row can be in the future of any, and only keys before the
    window of the last row can be too old for any.
    """
    keys = torch.arange(low, end, device=positions.device)
    rows = positions[:, None]
    hidden = []
    if (future := first + 1) < end:
        columns = slice(future - low, None)
        hidden.append((columns, keys[columns] > rows))
    if window is not None and (old := end - window) > low:
        columns = slice(0, old - low)
        hidden.append((columns, rows - keys[columns] >= window))
    return hidden
