"""Slow and obvious forms of the kernels, for tests and benchmarks to hold the fast ones against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Activation, Kernels
from .shapes import counted_rows, wide_dtype

__all__ = [
    "KERNELS",
    "attention",
    "attention_received",
    "decode_attention",
    "deviation",
    "gated",
    "rms_norm",
    "rotate_into",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """See `Attention`; here with a dense mask over all rows and keys."""
    weights = _weights(q, k, positions, scale, window)
    # What no row sees may be undefined, and 0 × NaN would not be 0.
    unseen = (weights == 0).all(dim=1).all(dim=0)
    v = v.masked_fill(unseen[None, :, None], 0)
    mixed: Tensor = weights @ v.repeat_interleave(q.shape[0] // v.shape[0], dim=0)
    return mixed.transpose(0, 1).flatten(1)


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
    counted_rows(rows, q.shape[1])
    weights = _weights(q, k, positions, scale, window)
    received = weights[:, rows].sum(dim=(0, 1), dtype=wide_dtype(q.dtype))
    return attention(q, k, v, positions, scale=scale, window=window), received


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
    rows = [
        attention(
            q[:, i : i + 1],
            k[:, :length],
            v[:, :length],
            torch.tensor([length - 1], device=q.device),
            scale=scale,
            window=window,
        )
        for i, (k, v, length) in enumerate(zip(keys, values, lengths, strict=True))
    ]
    return torch.cat(rows)


def rotate_into(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor, positions: slice | Tensor
) -> None:
    """See `RotateInto`."""
    x = x.to(out.dtype)
    if cos is not None and sin is not None:
        turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turning.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        x = torch.cat((turning * cos[positions] + swapped * sin[positions], still), dim=-1)
    out[:, positions] = x


def deviation(fresh: Tensor, stored: Tensor) -> Tensor:
    """See `Deviation`."""
    wide = wide_dtype(fresh.dtype)
    return (fresh.to(wide) - stored.to(wide)).square().sum(dim=(0, 2))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `RmsNorm`."""
    wide = x.to(weight.dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """See `Gated`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate) * up


_ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def _weights(
    q: Tensor, k: Tensor, positions: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Probabilities (heads, n, m)."""
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    rows, keys = positions[:, None], torch.arange(k.shape[1], device=q.device)
    visible = keys <= rows
    if window is not None:
        visible &= rows - keys < window
    scores = (q @ k.transpose(1, 2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)


KERNELS = Kernels(
    name="torch",
    attention=attention,
    attention_received=attention_received,
    decode_attention=decode_attention,
    rotate_into=rotate_into,
    deviation=deviation,
    rms_norm=rms_norm,
    gated=gated,
)
