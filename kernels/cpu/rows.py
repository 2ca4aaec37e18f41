"""What is done to each row alone, in as few passes of torch as it allows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Activation, RotateInto
from ..shapes import wide_dtype

__all__ = ["copy_or_rotate_into", "deviation", "gated", "rms_norm", "rotate_into"]


def rotate_into(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, positions: slice | Tensor
) -> None:
    """See `RotateInto`."""
    scattered = not isinstance(positions, slice)
    if cos is None or sin is None:
        if scattered:
            out[:, positions] = x.to(out.dtype)
        else:
            out[:, positions].copy_(x)
        return
    x = x.to(out.dtype)
    place = torch.empty_like(x) if scattered else out[:, positions]
    cos, sin = cos[positions], sin[positions]
    dim = cos.shape[-1]
    half = dim // 2
    torch.mul(x[..., :dim], cos, out=place[..., :dim])
    place[..., :half].addcmul_(x[..., half:dim], sin[:, :half])
    place[..., half:dim].addcmul_(x[..., :half], sin[:, half:])
    if dim < x.shape[-1]:
        place[..., dim:] = x[..., dim:]
    if scattered:
        out[:, positions] = place


def copy_or_rotate_into(
    rotate: RotateInto,
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    positions: slice | Tensor,
) -> None:
    """`rotate`, but a plain copy to neighbouring positions is torch's, which is faster at that."""
    if cos is None and isinstance(positions, slice):
        out[:, positions].copy_(x)
    else:
        rotate(x, cos, sin, out, positions)


def deviation(fresh: Tensor, stored: Tensor) -> Tensor:
    """See `Deviation`."""
    wide = wide_dtype(fresh.dtype)
    difference = fresh.to(wide) - stored.to(wide)
    return difference.square_().sum(dim=(0, 2))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `RmsNorm`."""
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """See `Gated`."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh").mul_(up)
