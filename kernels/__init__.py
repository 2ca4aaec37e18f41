"""Numeric kernels: a torch reference and the fast implementations behind the same signatures."""

from __future__ import annotations

from .choice import choose
from .contract import Activation, Deviation, Kernels
from .errors import KernelsUnavailableError
from .int8 import Int8Decoding
from .linear import Linear, linear
from .precision import compute_dtype

__all__ = [
    "Activation",
    "Deviation",
    "Int8Decoding",
    "Kernels",
    "KernelsUnavailableError",
    "Linear",
    "choose",
    "compute_dtype",
    "linear",
]
