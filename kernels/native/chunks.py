"""Stored K and V of many chunks into one layer of a cache, in one call of native code."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .operations import Native, threads_for

__all__ = ["KINDS", "PlacedChunk", "checked_places", "put_chunks"]

#: As put_chunks in rotate.c tells them apart.
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: K and V, (kv_heads, n, head_dim) each, and the position of their first token.
PlacedChunk = tuple[Tensor, Tensor, int]


def put_chunks(
    native: Native,
    chunks: Sequence[PlacedChunk],
    tables: tuple[Tensor, Tensor] | None,
    into_k: Tensor,
    into_v: Tensor,
) -> None:
    """Write each chunk's K, rotated, and V to its positions; see `RotateInto`.

    Args:
        chunks: float32, bfloat16 or float16 on the CPU, each of its own dtype and strides.
        tables: cosines and sines, float32 (positions, rotary_dim); None rotates nothing.
        into_k, into_v: float32 (kv_heads, capacity, head_dim), the last dimension contiguous.

    Raises:
        ValueError: something does not fit together; nothing has been written then.
    """
    heads, _, dim = into_k.shape
    reach, turns = checked_places(tables, into_k, into_v)
    numbers, kept, total = array("q"), [], 0
    for k, v, start in chunks:
        n = k.shape[1]
        if k.shape != (heads, n, dim) or v.shape != k.shape or v.dtype != k.dtype:
            raise ValueError(
                f"chunks must be ({heads}, n, {dim}), got k {k.dtype} {tuple(k.shape)} and v "
                f"{v.dtype} {tuple(v.shape)}"
            )
        if k.dtype not in KINDS or not (k.is_cpu and v.is_cpu):
            raise ValueError(f"cannot place {k.dtype} on {k.device}")
        if start < 0 or start + n > reach:
            raise ValueError(
                f"positions {start} .. {start + n - 1} are not within 0 .. {reach - 1}"
            )
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        kept.append((k, v))  # as long as the call
        numbers.extend(
            (
                KINDS[k.dtype],
                n,
                start,
                k.data_ptr(),
                *k.stride()[:2],
                v.data_ptr(),
                *v.stride()[:2],
            )
        )
        total += 2 * k.numel()
    if total:
        native.library.put_chunks(
            numbers.buffer_info()[0], len(chunks), heads, dim, *turns,
            into_k.data_ptr(), *into_k.stride()[:2], into_v.data_ptr(), *into_v.stride()[:2],
            threads_for(total),
        )  # fmt: skip


def checked_places(
    tables: tuple[Tensor, Tensor] | None, into_k: Tensor, into_v: Tensor
) -> tuple[int, tuple[int, int, int]]:
    """Positions that can be written, and the addresses of cosines and sines and how many turn."""
    _, capacity, dim = into_k.shape
    if into_v.shape != into_k.shape:
        raise ValueError(f"k {tuple(into_k.shape)} and v {tuple(into_v.shape)} must be alike")
    rotary, reach, pointers = 0, capacity, (0, 0)
    if tables is not None:
        cos, sin = tables
        reach, rotary = min(capacity, cos.shape[0]), cos.shape[1]
        if sin.shape != cos.shape or rotary > dim or rotary % 2:
            raise ValueError(
                f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not serve {dim} dimensions"
            )
        if not (cos.is_contiguous() and sin.is_contiguous()):
            raise ValueError("cos and sin must be contiguous")
        pointers = (cos.data_ptr(), sin.data_ptr())
    for name, out in (
        ("k", into_k),
        ("v", into_v),
        *zip(("cos", "sin"), tables or (), strict=False),
    ):
        if out.dtype != torch.float32 or not out.is_cpu or (out.stride(-1) != 1 and dim > 1):
            raise ValueError(
                f"{name} must be float32 on the CPU with contiguous rows, got {out.dtype} on "
                f"{out.device} with strides {out.stride()}"
            )
    return reach, (*pointers, rotary)
