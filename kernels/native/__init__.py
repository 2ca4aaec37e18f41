"""Kernels in C for CPUs that calculate in float32, compiled at first use by the system's compiler.

`load` gives them, or None where they cannot be had: then torch calculates.
"""

from __future__ import annotations

from .chunks import PlacedChunk, put_chunks
from .layers import LayerParts, LayersShape, NativeLayers, Product
from .library import load
from .memory import empty_huge
from .operations import Int8Weights, Native
from .panels import Panels
from .row_layer import RowLayer
from .stored import SegmentLayout, StoredKV, StoredSegment, put_stored
from .unpack import NativeUnpack

__all__ = [
    "Int8Weights",
    "LayerParts",
    "LayersShape",
    "Native",
    "NativeLayers",
    "NativeUnpack",
    "Panels",
    "PlacedChunk",
    "Product",
    "RowLayer",
    "SegmentLayout",
    "StoredKV",
    "StoredSegment",
    "empty_huge",
    "load",
    "put_chunks",
    "put_stored",
]
