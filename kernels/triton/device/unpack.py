"""Codes of stored K and V to numbers: memory-bound, every code read once."""

import triton
import triton.language as tl

__all__ = ["unpack_keys", "unpack_values"]


@triton.jit
def code_at(row_ptr, at, width, mask, BITS: tl.constexpr):
    """Code `at` of each row: a byte, or half of one, the high halves being those behind `width`."""
    if BITS == 8:
        return tl.load(row_ptr + at, mask=mask, other=0).to(tl.int32)
    high = at >= width
    byte = tl.load(row_ptr + tl.where(high, at - width, at), mask=mask, other=0).to(tl.int32)
    return tl.where(high, byte >> 4, byte & 15)


@triton.jit
def unpack_keys(
    rows_ptr,  # uint8, head after head, tokens rows each
    scales_ptr,  # bfloat16 (heads, groups, 2, HEAD_DIM)
    ranks_ptr,  # int32 (heads, HEAD_DIM): the how-manieth fine channel it is, or -1
    starts_ptr,  # int64 (heads,): where a head's rows begin
    fine_ptr,  # int32 (heads,): how many fine channels it has
    out_ptr,  # (heads, tokens, HEAD_DIM), contiguous
    tokens,
    groups,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Programs: (tiles of the tokens, heads). number = low + step * code."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)[None, :]
    inside = (token < tokens)[:, None] & (dims < HEAD_DIM)
    base = HEAD_DIM if BITS == 8 else (HEAD_DIM + 1) // 2
    fine = tl.load(fine_ptr + head)
    behind = (fine + 1) // 2
    row = rows_ptr + tl.load(starts_ptr + head) + (token * (base + behind))[:, None]
    code = code_at(row, dims, base, inside, BITS)
    rank = tl.load(ranks_ptr + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=-1)
    more = code_at(row + base, rank, behind, inside & (rank >= 0), 4)
    code = tl.where(rank >= 0, code * 16 + more, code)
    # Group g ends before token (g + 1) * tokens // groups.
    group = ((token + 1) * groups - 1) // tokens
    scale = scales_ptr + ((head * groups + group) * (2 * HEAD_DIM))[:, None] + dims
    low = tl.load(scale, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(scale + HEAD_DIM, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + ((head * tokens + token) * HEAD_DIM)[:, None] + dims
    tl.store(out, low + step * code.to(tl.float32), mask=inside)


@triton.jit
def unpack_values(
    rows_ptr,  # uint8 (n, row bytes)
    steps_ptr,  # bfloat16 (n, parts)
    out_ptr,  # (n, HEAD_DIM), contiguous
    parts,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # numbers that are transformed together
):
    """Programs: (n, runs of BLOCK numbers). y[i] = sum_j (-1)^popcount(i & j) x[j] / BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    base = HEAD_DIM if BITS == 8 else (HEAD_DIM + 1) // 2
    j = tl.arange(0, BLOCK)
    code = code_at(rows_ptr + row * base, first + j, base, j < BLOCK, BITS)
    step = tl.load(steps_ptr + row * parts + first * parts // HEAD_DIM).to(tl.float32)
    x = (code.to(tl.float32) - (127.5 if BITS == 8 else 7.5)) * (step / BLOCK)
    shared = j[:, None] & j[None, :]
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    signs = (1 - 2 * (shared & 1)).to(tl.float32)
    tl.store(out_ptr + row * HEAD_DIM + first + j, tl.sum(signs * x[None, :], 1))
