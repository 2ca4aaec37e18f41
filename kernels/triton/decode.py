"""Launcher of decoding: every sequence has K and V of its own, found by address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .device.attend import decode
from .launch import combined, on_device_of, options, part_buffers, unit_stride
from .tiles import key_splits, tile_for

__all__ = ["decode_attention"]

#: What loads of 16 bytes need of addresses in bytes and of strides in numbers.
_ALIGNMENT = 16


def decode_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """See `DecodeAttention`."""
    q, keys, values = unit_stride(q), [*map(unit_stride, keys)], [*map(unit_stride, values)]
    heads, n, dim = q.shape
    out, lse = q.new_empty(n, heads * dim), q.new_empty(n, heads, dtype=torch.float32)
    if n == 0:
        return out
    kv_heads = len(keys[0])
    group = heads // kv_heads
    # Address, strides of heads and of positions of K, the same of V, and the length.
    places = [
        [*_place(k), *_place(v), length] for k, v, length in zip(keys, values, lengths, strict=True)
    ]
    tile = tile_for(dim, q.dtype, group)
    seen = max(lengths) if window is None else min(window, max(lengths))
    splits = key_splits(n * kv_heads, seen, tile, q.device)
    parts, part_lse = part_buffers(out, lse, splits)
    with on_device_of(q):
        decode[(n, kv_heads, splits)](
            q,
            torch.tensor(places, dtype=torch.int64).to(q.device, non_blocking=True),
            parts,
            part_lse,
            group,
            *q.stride()[:2],
            **options(tile, dim, q.dtype, scale, window),
            ALIGNED=all(number % _ALIGNMENT == 0 for place in places for number in place[:-1]),
        )
        combined(parts, part_lse, out, lse)
    return out


def _place(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)
