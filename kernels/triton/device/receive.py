"""What keys receive: a second pass, by tiles of keys, that knows each row's softmax sum.

Each program adds up its own keys, row tile after row tile, so the sums do not depend on the order
in which programs run.
"""

import triton
import triton.language as tl

from .product import product

__all__ = ["receive"]


@triton.jit
def _first_row_from(positions_ptr, begin, end, position):
    """The first row of `begin` ... `end` at `position` or behind it; `end` if there is none."""
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        before = tl.load(positions_ptr + middle) < position
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def receive(
    q_ptr,  # (heads, n, HEAD_DIM)
    k_ptr,  # (kv_heads, m, HEAD_DIM)
    positions_ptr,  # int64 (n,)
    lse_ptr,  # float32 (n, heads)
    out_ptr,  # float32 (kv_heads, m)
    m,
    first_row,
    last_row,  # behind the last row that counts
    group,
    q_head,
    q_row,
    k_head,
    k_step,
    scale,
    window,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (tiles of the m keys, kv_heads)."""
    start = tl.program_id(0) * KEYS
    kv_head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * group
    dims = tl.arange(0, DIM)
    keys = start + tl.arange(0, KEYS)
    inside = keys < m
    k = tl.load(
        k_ptr + kv_head * k_head + keys[None, :].to(tl.int64) * k_step + dims[:, None],
        mask=inside[None, :] & (dims[:, None] < HEAD_DIM),
        other=0.0,
    )
    sums = tl.zeros((KEYS,), tl.float32)
    # Rows before the first key see none of the tile, rows a window behind the last key neither.
    begin = _first_row_from(positions_ptr, first_row, last_row, start)
    end = last_row
    if WINDOWED:
        end = _first_row_from(positions_ptr, begin, last_row, start + KEYS - 1 + window)
    for tile in range(begin * group, end * group, ROWS):
        rows = tile + tl.arange(0, ROWS)
        valid = rows < end * group
        row = (rows // group).to(tl.int64)
        head = kv_head * group + rows % group
        at = tl.load(positions_ptr + row, mask=valid, other=-1).to(tl.int32)
        q = tl.load(
            q_ptr + (head * q_head + row * q_row)[:, None] + dims[None, :],
            mask=valid[:, None] & (dims[None, :] < HEAD_DIM),
            other=0.0,
        )
        lse = tl.load(lse_ptr + row * heads + head, mask=valid, other=0.0)
        visible = (keys[None, :] <= at[:, None]) & inside[None, :]
        if WINDOWED:
            visible = visible & (at[:, None] - keys[None, :] < window)
        scores = product(q, k, PRECISION) * scale - lse[:, None]
        sums += tl.sum(tl.exp2(tl.where(visible, scores, float("-inf"))), 0)
    tl.store(out_ptr + kv_head * m + keys, sums, mask=inside)
