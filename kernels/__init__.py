"""Numeric kernels: a torch reference and the fast implementations behind the same signature."""

from __future__ import annotations

from .attention import attention
from .linear import Linear, linear
from .precision import compute_dtype

__all__ = ["Linear", "attention", "compute_dtype", "linear"]
