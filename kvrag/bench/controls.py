"""Strategies that exist to be beaten; they are not registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrag.fusion.cacheblend import CacheBlend
from kvrag.fusion.layerwise import LayerState

__all__ = ["NearestBlend", "RandomBlend"]


@dataclass(frozen=True, slots=True)
class RandomBlend(CacheBlend):
    """CacheBlend's schedule with rows drawn at random: what selection must be better than."""

    name: ClassVar[str] = "random"

    def scores(self, state: LayerState) -> Tensor:
        # Seeded by the layer: a run can be repeated, and layers draw independently.
        generator = torch.Generator().manual_seed(state.index)
        return torch.rand(len(state.positions), generator=generator)


@dataclass(frozen=True, slots=True)
class NearestBlend(CacheBlend):
    """CacheBlend's schedule with the rows nearest to the question: what windows see."""

    name: ClassVar[str] = "nearest"

    def scores(self, state: LayerState) -> Tensor:
        return state.positions
