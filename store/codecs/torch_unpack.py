"""Unpacking in torch: the reference, for every machine and for float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import row_nbytes, split
from .hadamard import block_width, hadamard

__all__ = ["group_ends", "torch_unpack"]


def group_ends(tokens: int, groups: int) -> list[int]:
    """Where each group of tokens ends; sizes differ by one at most."""
    return [(group + 1) * tokens // groups for group in range(groups)]


def torch_unpack(layer: Tensor, k: Tensor, v: Tensor, *, bits: int, groups: int, parts: int) -> int:
    """See `Unpack`; `k` and `v` may also be float64. Calculates in float32."""
    heads, tokens, dim = k.shape
    sizes = [heads * groups * 2 * dim * 2, heads * tokens * parts * 2, heads * -(-dim // 8)]
    v_nbytes = heads * tokens * row_nbytes(v.shape[2], bits)
    needed = sum(sizes) + v_nbytes
    if needed > layer.shape[0]:
        return needed
    scales, steps, masks = torch.split(layer[: sum(sizes)], sizes)
    fine = _channels(masks.view(heads, -1), dim)
    widths = [row_nbytes(dim, bits) + row_nbytes(len(channels), 4) for channels in fine]
    needed += tokens * sum(widths)
    if needed > layer.shape[0]:
        return needed
    *rows, v_rows = torch.split(
        layer[sum(sizes) : needed], [*(tokens * w for w in widths), v_nbytes]
    )
    of_heads = scales.view(torch.bfloat16).float().view(heads, groups, 2, dim)
    for head, (channels, width) in enumerate(zip(fine, widths, strict=True)):
        codes = _k_codes(rows[head].view(tokens, width), channels, dim, bits)
        start = 0
        for scale, end in zip(of_heads[head], group_ends(tokens, groups), strict=True):
            k[head, start:end] = scale[0] + scale[1] * codes[start:end].float()
            start = end
    _unpack_values(v_rows, steps.view(torch.bfloat16), v, bits, parts)
    return needed


def _channels(masks: Tensor, dim: int) -> list[Tensor]:
    """For each head the channels of its mask, int64, ascending."""
    bits = masks[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return [row.nonzero()[:, 0] for row in bits.view(len(masks), -1)[:, :dim]]


def _k_codes(rows: Tensor, fine: Tensor, dim: int, bits: int) -> Tensor:
    """One head's codes, uint8 (tokens, head_dim)."""
    width = row_nbytes(dim, bits)
    codes = split(rows[:, :width], dim, bits)
    if len(fine) == 0:
        return codes
    return codes.index_copy(1, fine, codes[:, fine] << 4 | split(rows[:, width:], len(fine), 4))


def _unpack_values(rows: Tensor, steps: Tensor, out: Tensor, bits: int, parts: int) -> None:
    heads, tokens, dim = out.shape
    codes = split(rows.view(heads, tokens, row_nbytes(dim, bits)), dim, bits)
    block = block_width(dim // parts)
    centred = codes.float().view(heads, tokens, parts, dim // parts) - (2**bits - 1) / 2
    scaled = centred * (steps.float() / block).view(heads, tokens, parts, 1)
    out.copy_(hadamard(scaled, block).view(out.shape))
