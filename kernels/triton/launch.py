"""What the launchers of attention have in common."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from .device.attend import combine
from .tiles import Tile, power_of_two

__all__ = ["COMPILATION", "combined", "on_device_of", "options", "part_buffers", "unit_stride"]

#: Of every kernel. Triton's default is about to change, and it warns about that.
COMPILATION = {"enable_fp_fusion": True}


def unit_stride(x: Tensor) -> Tensor:
    """`x` with neighbours in the last dimension next to one another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current GPU, which need not be that of `x`."""
    context: AbstractContextManager[object] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return context


def options(
    tile: Tile, dim: int, dtype: torch.dtype, scale: float | None, window: int | None
) -> dict[str, Any]:
    """Arguments by keyword of every kernel that multiplies tiles of queries and keys."""
    return {
        # Softmax in powers of two, which is what the hardware has.
        "scale": (dim**-0.5 if scale is None else scale) * math.log2(math.e),
        "window": window or 0,
        "HEAD_DIM": dim,
        "DIM": max(16, power_of_two(dim)),
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "WINDOWED": window is not None,
        "PRECISION": _precision(dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **COMPILATION,
    }


def part_buffers(out: Tensor, lse: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where each split of the keys leaves its result: `out` and `lse` themselves if it is one."""
    if splits == 1:
        return out, lse
    return (
        out.new_empty(splits, *out.shape, dtype=torch.float32),
        lse.new_empty(splits, *lse.shape),
    )


def combined(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Put the parts of `part_buffers` together in `out` (n, heads * head_dim) and `lse`."""
    if parts is out:
        return
    dim = out.shape[1] // lse.shape[1]
    combine[(lse.numel(),)](
        parts,
        part_lse,
        out,
        lse,
        len(parts),
        HEAD_DIM=dim,
        DIM=power_of_two(dim),
        SPLITS=power_of_two(len(parts)),
        num_warps=1 if len(parts) <= 8 else 4,
        **COMPILATION,
    )


def _precision(dtype: torch.dtype) -> str:
    if dtype is torch.bfloat16 and knobs.runtime.interpret:
        return "widened"
    # float32 is never rounded to TF32; the others have one way to be multiplied.
    return "ieee"
