"""Fusion strategies. Importing this package registers them."""

from __future__ import annotations

from kvrag.fusion import (
    cacheblend,
    controls,
    dhd,
    epic,
    full,
    query_attention,
    question_blend,
    reuse,
)
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
    "controls",
    "create",
    "dhd",
    "epic",
    "full",
    "fuse",
    "query_attention",
    "question_blend",
    "register",
    "reuse",
    "strategy_names",
]
