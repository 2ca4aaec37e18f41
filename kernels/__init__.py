"""Numeric kernels: a torch reference and the fast implementations behind the same signature."""

from __future__ import annotations

from .attention import attention
from .precision import compute_dtype

__all__ = ["attention", "compute_dtype"]
