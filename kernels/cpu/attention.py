"""Exact attention of sorted, possibly scattered query rows, by blocks of rows (CPU).

A block of rows sees only the keys from its first row's window up to its last position, so nothing
is computed for keys that no row of the block may see, and masks are needed at the block's ends
alone. The rows of a query group are stacked behind their KV head, so K and V are never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..contract import DecodeAttention
from ..native import Native
from ..shapes import counted_rows, wide_dtype

__all__ = ["BlockedAttention", "decode_attention"]

#: Rows a block: scores of a block stay in the cache, and few masked keys are computed.
BLOCK_ROWS = 64
#: Native code has blocks of its own in these and skips what a few neighbouring rows do not see;
#: they bound the memory that it takes.
NATIVE_BLOCK_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbouring rows and all keys that they see.

    first, last: row i of the block sees the keys `first[i] .. last[i] - 1` of the block's.
    counted: the rows of the block that count for what keys receive.
    """

    rows: slice
    keys: slice
    first: tuple[int, ...]
    last: tuple[int, ...]
    counted: range


class BlockedAttention:
    """`Attention` and `AttentionReceived`; `native` calculates the blocks if it is given."""

    def __init__(self, native: Native | None) -> None:
        self._native = native
        self._decode: DecodeAttention = native.decode_attention if native else decode_attention

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
        out = q.new_empty(n, heads * dim)
        scale = dim**-0.5 if scale is None else scale
        at = tuple(positions.tolist())
        most = NATIVE_BLOCK_ROWS if self._native else _block_rows(at)
        blocks = _blocks(at, window, counted, most)
        if self._native is None:
            _multiply(q * scale, k, v, blocks, out, received)
            return out
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        for block in blocks:
            place = received[block.keys] if received is not None and block.counted else None
            self._native.attend(
                q[:, block.rows], k[:, block.keys], v[:, block.keys], block.first, block.last,
                out[block.rows], scale=scale, received=place, counted=block.counted,
            )  # fmt: skip
        return out


def _multiply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[_Block],
    out: Tensor,
    received: Tensor | None,
) -> None:
    """All blocks by two products of torch for each KV head; `q` is scaled.

    Scores of one block and one KV head are computed in place in one buffer that stays in the cache:
    fresh buffers of that size come from the operating system page by page, which costs more than
    the products do.
    """
    (heads, n, dim), kv_heads = q.shape, k.shape[0]
    group = heads // kv_heads
    grouped, mixed = q.view(kv_heads, group, n, dim), out.view(n, kv_heads, group, dim)
    sizes = [(len(block.last), block.keys.stop - block.keys.start) for block in blocks]
    scratch = q.new_empty(group * max((rows * keys for rows, keys in sizes), default=0))
    for block, (rows, keys) in zip(blocks, sizes, strict=True):
        scores = scratch[: group * rows * keys].view(group * rows, keys)
        for head in range(kv_heads):
            few = grouped[head, :, block.rows].reshape(group * rows, dim)
            torch.mm(few, k[head, block.keys].t(), out=scores)
            _softmax_(scores, block)
            product = torch.mm(scores, v[head, block.keys]).view(group, rows, dim)
            mixed[block.rows, head] = product.transpose(0, 1)
            if received is not None and block.counted:
                giving = slice(block.counted.start, block.counted.stop)
                given = scores.view(group, rows, keys)[:, giving]
                received[block.keys] += given.sum(dim=(0, 1), dtype=received.dtype)


def _softmax_(scores: Tensor, block: _Block) -> None:
    """Of each row (group * rows, keys) over what it sees, in place; the rest becomes exactly 0.

    Only the ends, where some row sees less than another, need a mask.
    """
    by_row = scores.view(-1, len(block.last), scores.shape[1])
    nobody_before, somebody_until = block.first[-1], block.last[0]
    if nobody_before > 0:
        first = torch.tensor(block.first, device=scores.device)
        columns = torch.arange(nobody_before, device=scores.device)
        by_row[..., :nobody_before].masked_fill_(columns < first[:, None], float("-inf"))
    if somebody_until < scores.shape[1]:
        last = torch.tensor(block.last, device=scores.device)
        columns = torch.arange(somebody_until, scores.shape[1], device=scores.device)
        by_row[..., somebody_until:].masked_fill_(columns >= last[:, None], float("-inf"))
    torch.softmax(scores, dim=-1, out=scores)


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


@lru_cache(maxsize=8)  # the layers of a pass ask for the same again
def _blocks(
    at: tuple[int, ...], window: int | None, counted: range, most: int
) -> tuple[_Block, ...]:
    """Blocks of at most so many of the rows at these positions.

    Windows of neighbours in a block touch, so that every key of a block is seen by one of its
    rows: what nobody sees may be undefined, and 0 × NaN would not be 0.
    """
    blocks = []
    start = 0
    for row in range(1, len(at) + 1):
        full = row == len(at) or row - start == most
        if full or (window is not None and at[row] - at[row - 1] > window):
            low = 0 if window is None else max(0, at[start] - window + 1)
            last = tuple(p + 1 - low for p in at[start:row])
            first = tuple(0 if window is None else max(0, end - window) for end in last)
            giving = range(max(counted.start - start, 0), min(counted.stop, row) - start)
            keys = slice(low, at[row - 1] + 1)
            blocks.append(_Block(slice(start, row), keys, first, last, giving))
            start = row
    return tuple(blocks)
