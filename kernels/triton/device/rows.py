"""What is done to each row alone: memory-bound, every number read and written once."""

import triton
import triton.language as tl

__all__ = ["deviate", "gate", "norm", "rotate"]


@triton.jit
def rotate(
    x_ptr,  # (heads, n, HEAD_DIM)
    cos_ptr,  # (positions, ROTARY_DIM)
    sin_ptr,  # (positions, ROTARY_DIM), first half negated
    out_ptr,  # (heads, capacity, HEAD_DIM)
    positions_ptr,  # int64 (n,) where SCATTERED
    n,
    first,  # the position of row 0 otherwise
    x_head,
    x_row,
    cos_row,
    sin_row,
    out_head,
    out_row,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,  # 0 copies
    SCATTERED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Programs: (tiles of the n rows, heads).

    y = x * cos + [x2, x1] * [-sin, sin] over the halves x1, x2 of the first ROTARY_DIM dimensions.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    valid = row < n
    at = row + first
    if SCATTERED:
        at = tl.load(positions_ptr + row, mask=valid, other=0)
    dims = tl.arange(0, DIM)[None, :]
    inside = valid[:, None] & (dims < HEAD_DIM)
    source = x_ptr + head * x_head + (row * x_row)[:, None]
    y = tl.load(source + dims, mask=inside, other=0.0).to(tl.float32)
    if ROTARY_DIM > 0:
        turning = valid[:, None] & (dims < ROTARY_DIM)
        swapped = tl.where(dims < ROTARY_DIM // 2, dims + ROTARY_DIM // 2, dims - ROTARY_DIM // 2)
        other = tl.load(source + swapped, mask=turning, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + (at * cos_row)[:, None] + dims, mask=turning, other=1.0)
        sin = tl.load(sin_ptr + (at * sin_row)[:, None] + dims, mask=turning, other=0.0)
        y = y * cos.to(tl.float32) + other * sin.to(tl.float32)
    tl.store(out_ptr + head * out_head + (at * out_row)[:, None] + dims, y, mask=inside)


@triton.jit
def deviate(
    fresh_ptr,  # (heads, n, HEAD_DIM)
    stored_ptr,  # (heads, n, HEAD_DIM)
    out_ptr,  # float32 (n,)
    n,
    heads,
    fresh_head,
    fresh_row,
    stored_head,
    stored_row,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Programs: (tiles of the n rows,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    valid = row < n
    dims = tl.arange(0, DIM)[None, :]
    inside = valid[:, None] & (dims < HEAD_DIM)
    fresh = fresh_ptr + (row * fresh_row)[:, None] + dims
    stored = stored_ptr + (row * stored_row)[:, None] + dims
    sums = tl.zeros((ROWS,), tl.float32)
    for _ in range(heads):
        difference = tl.load(fresh, mask=inside, other=0.0).to(tl.float32)
        difference -= tl.load(stored, mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(difference * difference, 1)
        fresh += fresh_head
        stored += stored_head
    tl.store(out_ptr + row, sums, mask=valid)


@triton.jit
def norm(
    x_ptr,  # (n, size)
    weight_ptr,  # float32 (size,)
    out_ptr,  # (n, size), contiguous
    size,
    x_row,
    eps,
    SIZE: tl.constexpr,
):
    """Programs: (n,)."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, SIZE)
    inside = dims < size
    x = tl.load(x_ptr + row * x_row + dims, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dims, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(out_ptr + row * size + dims, x * scale * weight, mask=inside)


@triton.jit
def gate(
    x_ptr,  # (n, 2 * size), the gates in front
    out_ptr,  # (n, size), contiguous
    size,
    x_row,
    SILU: tl.constexpr,  # else GELU by tanh
    SIZE: tl.constexpr,
):
    """Programs: (n, tiles of `size`)."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = dims < size
    x = tl.load(x_ptr + row * x_row + dims, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_row + size + dims, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = x * tl.sigmoid(x)
    else:
        # 0.5 * (1 + tanh(z)) is sigmoid(2 * z); z = sqrt(2 / pi) * (x + 0.044715 * x**3).
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    tl.store(out_ptr + row * size + dims, y * up, mask=inside)
