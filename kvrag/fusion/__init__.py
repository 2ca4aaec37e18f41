"""Fusion strategies. Importing this package registers them."""

from __future__ import annotations

from kvrag.fusion import cacheblend, full, reuse
from kvrag.fusion.base import (
    Fused,
    FusionReport,
    FusionRun,
    FusionStrategy,
    LayerStream,
    create,
    fuse,
    register,
    strategy_names,
)
from kvrag.fusion.prompt import ChunkSpan, Prompt

__all__ = [
    "ChunkSpan",
    "Fused",
    "FusionReport",
    "FusionRun",
    "FusionStrategy",
    "LayerStream",
    "Prompt",
    "cacheblend",
    "create",
    "full",
    "fuse",
    "register",
    "reuse",
    "strategy_names",
]
