"""Launchers of attention where all rows see the same K and V."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shapes import counted_rows
from .device.attend import attend
from .device.receive import receive
from .launch import combined, on_device_of, options, part_buffers, unit_stride
from .tiles import key_splits, tile_for

__all__ = ["attention", "attention_received"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """See `Attention`."""
    return _attend(unit_stride(q), unit_stride(k), unit_stride(v), positions, scale, window)[0]


def attention_received(
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
    q, k = unit_stride(q), unit_stride(k)
    mixed, lse = _attend(q, k, unit_stride(v), positions, scale, window)
    kv_heads, m, dim = k.shape
    group = len(q) // kv_heads
    received = q.new_empty(kv_heads, m, dtype=torch.float32)
    tile = tile_for(dim, q.dtype, len(counted) * group)
    with on_device_of(q):
        receive[(-(-m // tile.keys), kv_heads)](
            q,
            k,
            positions,
            lse,
            received,
            m,
            counted.start,
            max(counted.start, counted.stop),
            group,
            *q.stride()[:2],
            *k.stride()[:2],
            **options(tile, dim, q.dtype, scale, window),
        )
    return mixed, received.sum(0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Mixed values (n, heads * head_dim), and log2 of each softmax sum: float32 (n, heads)."""
    heads, n, dim = q.shape
    kv_heads, m, _ = k.shape
    group = heads // kv_heads
    out, lse = q.new_empty(n, heads * dim), q.new_empty(n, heads, dtype=torch.float32)
    if n == 0:
        return out, lse
    tile = tile_for(dim, q.dtype, n * group)
    tiles = -(-n * group // tile.rows)
    splits = key_splits(tiles * kv_heads, m, tile, q.device)
    parts, part_lse = part_buffers(out, lse, splits)
    with on_device_of(q):
        attend[(tiles, kv_heads, splits)](
            q,
            k,
            v,
            positions,
            parts,
            part_lse,
            n,
            group,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            **options(tile, dim, q.dtype, scale, window),
        )
        combined(parts, part_lse, out, lse)
    return out, lse
