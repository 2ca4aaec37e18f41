"""Attention by tiles of queries and keys with a running softmax, in powers of two."""

import triton
import triton.language as tl

from .product import product

__all__ = ["attend", "combine", "decode"]


@triton.jit
def _walk_keys(
    q,  # (ROWS, DIM)
    at,  # (ROWS,) positions, -1 for rows that do not exist
    k_ptr,  # (keys, HEAD_DIM), strides k_step and 1
    v_ptr,  # (keys, HEAD_DIM), strides v_step and 1
    k_step,
    v_step,
    begin,
    end,
    scale,
    window,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Mean of V over the keys from `begin` to `end`, and log2 of the sum of exp2 of the scores.

    The latter is -inf where a row sees none of them. Without a window, each of these keys must be
    seen by some row.
    """
    dims = tl.arange(0, DIM)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIM), tl.float32)
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside = keys < end
        visible = (keys[None, :] <= at[:, None]) & inside[None, :]
        if WINDOWED:
            visible = visible & (at[:, None] - keys[None, :] < window)
        k = tl.load(
            k_ptr + keys[None, :] * k_step + dims[:, None],
            mask=inside[None, :] & (dims[:, None] < HEAD_DIM),
            other=0.0,
        )
        scores = product(q, k, PRECISION) * scale
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen no key yet has no peak; -inf - -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weights, 1)
        seen = inside
        if WINDOWED:
            # V of a key that no row sees may be NaN, and 0 * NaN is NaN.
            seen = tl.max(visible.to(tl.int32), 0) > 0
        v = tl.load(
            v_ptr + keys[:, None] * v_step + dims[None, :],
            mask=seen[:, None] & (dims[None, :] < HEAD_DIM),
            other=0.0,
        )
        mixed = mixed * fade[:, None] + product(weights.to(v.dtype), v, PRECISION)
        peak = higher
    some = total > 0
    mean = mixed / tl.where(some, total, 1.0)[:, None]
    return mean, tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))


@triton.jit
def _part(low, end, split, splits, KEYS: tl.constexpr):
    """The share of the keys from `low` to `end` that falls to `split`: whole tiles."""
    tiles = tl.cdiv(end - low, KEYS)
    each = tl.cdiv(tiles, splits) * KEYS
    begin = low + split * each
    return begin, tl.minimum(begin + each, end)


@triton.jit
def attend(
    q_ptr,  # (heads, n, HEAD_DIM)
    k_ptr,  # (kv_heads, m, HEAD_DIM)
    v_ptr,  # (kv_heads, m, HEAD_DIM)
    positions_ptr,  # int64 (n,)
    out_ptr,  # (splits, n, heads, HEAD_DIM)
    lse_ptr,  # float32 (splits, n, heads)
    n,
    group,
    q_head,
    q_row,
    k_head,
    k_step,
    v_head,
    v_step,
    scale,
    window,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (tiles of the n * group rows, kv_heads, splits of the keys)."""
    tile = tl.program_id(0)
    # int64, because a cache may hold more than 2**31 numbers.
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    heads = tl.num_programs(1) * group
    dims = tl.arange(0, DIM)
    rows = tile * ROWS + tl.arange(0, ROWS)
    count = n * group
    valid = rows < count
    row = (rows // group).to(tl.int64)
    head = kv_head * group + rows % group
    at = tl.load(positions_ptr + row, mask=valid, other=-1).to(tl.int32)
    inside = valid[:, None] & (dims[None, :] < HEAD_DIM)
    q = tl.load(
        q_ptr + (head * q_head + row * q_row)[:, None] + dims[None, :], mask=inside, other=0.0
    )
    low = 0
    if WINDOWED:
        first = tl.load(positions_ptr + tile * ROWS // group).to(tl.int32)
        low = tl.maximum(0, first - window + 1)
    last = tl.load(positions_ptr + (tl.minimum(tile * ROWS + ROWS, count) - 1) // group)
    begin, end = _part(low, last.to(tl.int32) + 1, split, splits, KEYS)
    mean, lse = _walk_keys(
        q,
        at,
        k_ptr + kv_head * k_head,
        v_ptr + kv_head * v_head,
        k_step,
        v_step,
        begin,
        end,
        scale,
        window,
        HEAD_DIM,
        DIM,
        ROWS,
        KEYS,
        WINDOWED,
        PRECISION,
    )
    place = (split.to(tl.int64) * n + row) * heads + head
    tl.store(lse_ptr + place, lse, mask=valid)
    tl.store(out_ptr + place[:, None] * HEAD_DIM + dims[None, :], mean, mask=inside)


@triton.jit
def decode(
    q_ptr,  # (heads, n, HEAD_DIM)
    places_ptr,  # int64 (n, 7): see `decode.py` of the launchers
    out_ptr,  # (splits, n, heads, HEAD_DIM)
    lse_ptr,  # float32 (splits, n, heads)
    group,
    q_head,
    q_row,
    scale,
    window,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Programs: (sequences, kv_heads, splits of the keys). K and V have the dtype of `q`.

    A tile holds the heads of one query group, so ROWS must be at least `group`.
    """
    sequence = tl.program_id(0).to(tl.int64)
    n = tl.num_programs(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    heads = tl.num_programs(1) * group
    dims = tl.arange(0, DIM)
    rows = tl.arange(0, ROWS)
    valid = rows < group
    head = kv_head * group + rows
    inside = valid[:, None] & (dims[None, :] < HEAD_DIM)
    q = tl.load(
        q_ptr + head[:, None] * q_head + sequence * q_row + dims[None, :], mask=inside, other=0.0
    )
    place = places_ptr + sequence * 7
    k_head, k_step = tl.load(place + 1), tl.load(place + 2)
    v_head, v_step = tl.load(place + 4), tl.load(place + 5)
    k_ptr = tl.load(place).to(q_ptr.dtype)
    v_ptr = tl.load(place + 3).to(q_ptr.dtype)
    if ALIGNED:
        # What the compiler finds out by itself of plain arguments: loads of 16 bytes are possible.
        k_head, k_step = tl.multiple_of(k_head, 16), tl.multiple_of(k_step, 16)
        v_head, v_step = tl.multiple_of(v_head, 16), tl.multiple_of(v_step, 16)
        k_ptr, v_ptr = tl.multiple_of(k_ptr, 16), tl.multiple_of(v_ptr, 16)
    length = tl.load(place + 6).to(tl.int32)
    low = 0
    if WINDOWED:
        low = tl.maximum(0, length - window)
    begin, end = _part(low, length, split, splits, KEYS)
    mean, lse = _walk_keys(
        q,
        tl.where(valid, length - 1, -1),
        k_ptr + kv_head * k_head,
        v_ptr + kv_head * v_head,
        k_step,
        v_step,
        begin,
        end,
        scale,
        window,
        HEAD_DIM,
        DIM,
        ROWS,
        KEYS,
        WINDOWED,
        PRECISION,
    )
    to = (split * n + sequence) * heads + head
    tl.store(lse_ptr + to, lse, mask=valid)
    tl.store(out_ptr + to[:, None] * HEAD_DIM + dims[None, :], mean, mask=inside)


@triton.jit
def combine(
    parts_ptr,  # float32 (splits, rows, HEAD_DIM)
    part_lse_ptr,  # float32 (splits, rows)
    out_ptr,  # (rows, HEAD_DIM)
    lse_ptr,  # float32 (rows,)
    splits,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Programs: (rows,). Each part weighs as much as the scores that it has seen."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    dims = tl.arange(0, DIM)
    parts = tl.arange(0, SPLITS)
    some = parts < splits
    lse = tl.load(part_lse_ptr + parts * rows + row, mask=some, other=float("-inf"))
    peak = tl.max(lse, 0)
    weights = tl.exp2(lse - peak)
    total = tl.sum(weights, 0)
    means = tl.load(
        parts_ptr + (parts * rows + row)[:, None] * HEAD_DIM + dims[None, :],
        mask=some[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    )
    mixed = tl.sum(means * weights[:, None], 0) / total
    tl.store(out_ptr + row * HEAD_DIM + dims, mixed, mask=dims < HEAD_DIM)
    tl.store(lse_ptr + row, peak + tl.log2(total))
