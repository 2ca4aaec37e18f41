"""Kernels for GPUs. Imported only when they are chosen, because it imports triton."""

from __future__ import annotations

from ..contract import Kernels
from .attention import attention, attention_received
from .decode import decode_attention
from .rows import deviation, gated, rms_norm, rotate_into

__all__ = ["KERNELS"]

KERNELS = Kernels(
    name="triton",
    attention=attention,
    attention_received=attention_received,
    decode_attention=decode_attention,
    rotate_into=rotate_into,
    deviation=deviation,
    rms_norm=rms_norm,
    gated=gated,
)
