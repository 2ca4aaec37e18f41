"""Launcher of decoding stored K and V: what `NativeUnpack` does, for a layer that is on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .device import unpack as device
from .launch import COMPILATION, on_device_of
from .tiles import power_of_two

__all__ = ["unpack"]

#: Numbers a program.
_NUMBERS = 2048


def unpack(layer: Tensor, k: Tensor, v: Tensor, *, bits: int, groups: int, parts: int) -> int:
    """See `NativeUnpack.__call__`; all tensors are on one device.

    Asks the device once, for how many fine channels there are.
    """
    heads, tokens, dim = k.shape
    v_dim = v.shape[2]
    widths = [n if bits == 8 else (n + 1) // 2 for n in (dim, v_dim)]
    sizes = [heads * groups * dim * 4, heads * tokens * parts * 2, heads * -(-dim // 8)]
    needed = sum(sizes) + heads * tokens * widths[1]
    if needed > len(layer):
        return needed
    scales, steps, masks = torch.split(layer[: sum(sizes)], sizes)
    shifts = torch.arange(8, dtype=torch.uint8, device=layer.device)
    bits_of = (masks.view(heads, -1, 1) >> shifts & 1).view(heads, -1)[:, :dim].int()
    fine = bits_of.sum(1, dtype=torch.int32)
    of_head = tokens * (widths[0] + (fine.long() + 1) // 2)
    k_nbytes = int(of_head.sum())
    needed += k_nbytes
    if needed > len(layer) or tokens == 0:
        return needed
    rows = layer[sum(sizes) : needed]
    ranks = torch.where(bits_of > 0, bits_of.cumsum(1) - 1, -1).int()
    starts = of_head.cumsum(0) - of_head
    tile = max(1, _NUMBERS // power_of_two(dim))
    part = v_dim // parts
    block = min(64, part & -part)
    with on_device_of(layer):
        device.unpack_keys[(-(-tokens // tile), heads)](
            rows,
            scales.view(torch.bfloat16),
            ranks,
            starts,
            fine,
            k,
            tokens,
            groups,
            HEAD_DIM=dim,
            DIM=power_of_two(dim),
            BITS=bits,
            ROWS=tile,
            **COMPILATION,
        )
        device.unpack_values[(heads * tokens, v_dim // block)](
            rows[k_nbytes:],
            steps.view(torch.bfloat16),
            v,
            parts,
            HEAD_DIM=v_dim,
            BITS=bits,
            BLOCK=block,
            **COMPILATION,
        )
    return needed
