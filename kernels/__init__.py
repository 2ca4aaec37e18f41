"""Numeric kernels: a torch reference and the fast implementations behind the same signature."""

from __future__ import annotations

from .attention import attention
from .int8 import Int8Decoding
from .linear import Linear, linear
from .precision import compute_dtype

__all__ = ["Int8Decoding", "Linear", "attention", "compute_dtype", "linear"]
