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
from typing import Protocol

import torch
from torch import Tensor

from ..contract import DecodeAttention
from ..shapes import counted_rows, wide_dtype

__all__ = ["BlockedAttention", "SoftmaxRows", "decode_attention", "softmax_rows_"]

#: Rows a block: scores of a block stay in the cache, and few masked keys are computed.
BLOCK_ROWS = 64


class SoftmaxRows(Protocol):
    """Softmax of each row over its own columns, in place."""

    def __call__(
        self,
        scores: Tensor,
        first: Tensor,
        last: Tensor,
        *,
        received: Tensor | None = None,
        counted: range | None = None,
    ) -> None:
        """Row r sees the columns `first[i] .. last[i] - 1`, i being r modulo their length.

        The others become exactly 0, whatever they hold.

        Args:
            scores: (rows, columns), columns contiguous.
            first, last: int64 (period,), ascending, `0 <= first < last <= columns`; the period
                divides rows.
            received: (columns,); gets the probabilities of the counted rows added.
            counted: which i count, if `received` is given; all if None.
        """
        ...


class BlockedAttention:
    """`Attention` and `AttentionReceived` with a choice of what is done between the products."""

    def __init__(self, softmax_rows_: SoftmaxRows, decode: DecodeAttention) -> None:
        self._softmax_rows_, self._decode = softmax_rows_, decode

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """See `Attention`."""
        if len(positions) == 1:
            return self._decode(q, [k], [v], [int(positions) + 1], scale=scale, window=window)
        return self._attend(q, k, v, positions, scale, window)

    def attention_received(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        rows: slice = slice(None),
        scale: float | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionReceived`."""
        counted = counted_rows(rows, q.shape[1])
        received = q.new_zeros(k.shape[1], dtype=wide_dtype(q.dtype))
        return self._attend(q, k, v, positions, scale, window, counted, received), received

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        scale: float | None,
        window: int | None,
        counted: range = range(0),
        received: Tensor | None = None,
    ) -> Tensor:
        """The mixed values; what the `counted` rows give to the keys is added to `received`."""
        heads, n, dim = q.shape
        kv_heads = k.shape[0]
        group = heads // kv_heads
        grouped = (q * (dim**-0.5 if scale is None else scale)).view(kv_heads, group, n, dim)
        out = q.new_empty(n, kv_heads, group, dim)
        blocks = list(_blocks(positions.tolist(), window))
        largest = max(((stop - start) * (end - low) for start, stop, low, end in blocks), default=0)
        scratch = q.new_empty(group * largest)
        for start, stop, low, end in blocks:
            rows = stop - start
            scores = scratch[: group * rows * (end - low)].view(group * rows, end - low)
            last = positions[start:stop] + (1 - low)
            first = torch.zeros_like(last) if window is None else (last - window).clamp_(min=0)
            giving = range(max(counted.start - start, 0), min(counted.stop - start, rows))
            place = received[low:end] if received is not None and giving else None
            for head in range(kv_heads):
                block = grouped[head, :, start:stop].reshape(group * rows, dim)
                torch.mm(block, k[head, low:end].t(), out=scores)
                self._softmax_rows_(scores, first, last, received=place, counted=giving)
                mixed = torch.mm(scores, v[head, low:end]).view(group, rows, dim)
                out[start:stop, head] = mixed.transpose(0, 1)
        return out.view(n, heads * dim)


def softmax_rows_(
    scores: Tensor,
    first: Tensor,
    last: Tensor,
    *,
    received: Tensor | None = None,
    counted: range | None = None,
) -> None:
    """See `SoftmaxRows`. Only the ends, where some row sees less than another, need a mask."""
    by_row = scores.view(-1, len(first), scores.shape[1])
    nobody_before, somebody_until = int(first[-1]), int(last[0])
    if nobody_before > 0:
        columns = torch.arange(nobody_before, device=scores.device)
        by_row[..., :nobody_before].masked_fill_(columns < first[:, None], float("-inf"))
    if somebody_until < scores.shape[1]:
        columns = torch.arange(somebody_until, scores.shape[1], device=scores.device)
        by_row[..., somebody_until:].masked_fill_(columns >= last[:, None], float("-inf"))
    torch.softmax(scores, dim=-1, out=scores)
    if received is not None:
        giving = slice(None) if counted is None else slice(counted.start, counted.stop)
        received += by_row[:, giving].sum(dim=(0, 1), dtype=received.dtype)


def decode_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """See `DecodeAttention`: no mask is needed, and one batched product serves all heads."""
    dim = q.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    rows = []
    for i, (k, v, length) in enumerate(zip(keys, values, lengths, strict=True)):
        seen = slice(0 if window is None else max(0, length - window), length)
        grouped = (q[:, i] * scale).view(len(k), -1, dim)
        scores = torch.bmm(grouped, k[:, seen].transpose(1, 2))
        rows.append(torch.bmm(scores.softmax(dim=-1), v[:, seen]).view(1, -1))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _block_rows(at: Sequence[int]) -> int:
    """Few rows, far apart, make a block of keys that most of its rows do not see: 4 blocks of 205
    rows among 4,096 keys compute a third more than is wanted, 8 blocks a sixth."""
    scattered = len(at) > 1 and at[-1] - at[0] > 2 * len(at)
    return max(16, min(BLOCK_ROWS, len(at) // 8)) if scattered else BLOCK_ROWS


def _blocks(at: Sequence[int], window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(first row, behind the last row, first key, behind the last key) of each block.

    Windows of neighbours in a block touch, so that every key of a block is seen by one of its
    rows: what nobody sees may be undefined, and 0 × NaN would not be 0.
    """
    start, most = 0, _block_rows(at)
    for row in range(1, len(at) + 1):
        full = row == len(at) or row - start == most
        if full or (window is not None and at[row] - at[row - 1] > window):
            low = 0 if window is None else max(0, at[start] - window + 1)
            yield start, row, low, at[row - 1] + 1
            start = row
