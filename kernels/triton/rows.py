"""Launchers of what is done to each row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Activation
from .device import rows as device
from .launch import COMPILATION, on_device_of, unit_stride
from .tiles import power_of_two

__all__ = ["deviation", "gated", "rms_norm", "rotate_into"]

#: Numbers a program: enough to hide the memory's latency, few enough for many programs.
_NUMBERS = 2048


def rotate_into(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, positions: slice | Tensor
) -> None:
    """See `RotateInto`."""
    x = unit_stride(x)
    heads, n, dim = x.shape
    if n == 0:
        return
    if isinstance(positions, slice):
        first, scattered = positions.indices(out.shape[1])[0], None
    else:
        first, scattered = 0, positions
    # The compiler drops what a constant condition never reads; something must stand there.
    cos = x if cos is None else cos
    turned = 0 if sin is None else sin.shape[1]
    sin = x if sin is None else sin
    rows = _rows(dim)
    with on_device_of(x):
        device.rotate[(-(-n // rows), heads)](
            x,
            cos,
            sin,
            out,
            x if scattered is None else scattered,
            n,
            first,
            *x.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            *out.stride()[:2],
            HEAD_DIM=dim,
            DIM=power_of_two(dim),
            ROTARY_DIM=turned,
            SCATTERED=scattered is not None,
            ROWS=rows,
            **COMPILATION,
        )


def deviation(fresh: Tensor, stored: Tensor) -> Tensor:
    """See `Deviation`."""
    fresh, stored = unit_stride(fresh), unit_stride(stored)
    heads, n, dim = fresh.shape
    out = fresh.new_empty(n, dtype=torch.float32)
    if n == 0:
        return out
    rows = _rows(dim)
    with on_device_of(fresh):
        device.deviate[(-(-n // rows),)](
            fresh,
            stored,
            out,
            n,
            heads,
            *fresh.stride()[:2],
            *stored.stride()[:2],
            HEAD_DIM=dim,
            DIM=power_of_two(dim),
            ROWS=rows,
            **COMPILATION,
        )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `RmsNorm`."""
    size = x.shape[-1]
    rows = unit_stride(x.reshape(-1, size))
    out = x.new_empty(x.shape)
    if len(rows) == 0:
        return out
    padded = power_of_two(size)
    with on_device_of(x):
        device.norm[(len(rows),)](
            rows,
            weight,
            out,
            size,
            rows.stride(0),
            eps,
            SIZE=padded,
            num_warps=min(16, max(1, padded // 512)),
            **COMPILATION,
        )
    return out


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """See `Gated`."""
    gate_up = unit_stride(gate_up)
    n, size = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(n, size)
    if n == 0:
        return out
    tile = min(_NUMBERS, power_of_two(size))
    with on_device_of(gate_up):
        device.gate[(n, -(-size // tile))](
            gate_up,
            out,
            size,
            gate_up.stride(0),
            SILU=activation == "silu",
            SIZE=tile,
            **COMPILATION,
        )
    return out


def _rows(dim: int) -> int:
    return max(1, _NUMBERS // power_of_two(dim))
