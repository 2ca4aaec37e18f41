"""Kernels for CPUs: blocked products of torch, or native code where it can run."""

from __future__ import annotations

from functools import partial

from ..contract import Kernels
from ..native import Native
from .attention import BlockedAttention, decode_attention
from .rows import copy_or_rotate_into, deviation, gated, rms_norm, rotate_into

__all__ = ["cpu_kernels"]


def cpu_kernels(native: Native | None) -> Kernels:
    """With torch alone, on any device; with `native`, for float32 on the CPU only."""
    blocked = BlockedAttention(native)
    return Kernels(
        name="native" if native else "cpu",
        attention=blocked.attention,
        attention_received=blocked.attention_received,
        decode_attention=native.decode_attention if native else decode_attention,
        rotate_into=partial(copy_or_rotate_into, native.rotate_into) if native else rotate_into,
        deviation=deviation,
        rms_norm=native.rms_norm if native else rms_norm,
        gated=native.gated if native else gated,
        native=native,
    )
