"""Controls: choices without judgement, which every selector must beat at the same ratio."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrag.fusion.base import register, whole
from kvrag.fusion.layerwise import LayerwiseStrategy
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.selection import Choice, best, share

__all__ = ["NearestRows", "RandomRows"]


@dataclass(frozen=True, slots=True)
class _Control(LayerwiseStrategy):
    """`ratio` of the context rows, chosen before anything is known of them."""

    def begin(self, prompt: Prompt, candidates: range, attention: Tensor) -> Choice:
        scores = self.scores(len(candidates)).to(attention.device)
        return best(scores, share(self.ratio, len(candidates)))

    @abstractmethod
    def scores(self, count: int) -> Tensor:
        """One a candidate (count,)."""


@register
@dataclass(frozen=True, slots=True)
class RandomRows(_Control):
    """Rows drawn at random.

    Args:
        seed: the same seed draws the same rows of a prompt of the same length.

    Raises:
        InputError: see `FusionStrategy`; or the seed is no whole number of 0 or more.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        LayerwiseStrategy.__post_init__(self)
        whole("seed", self.seed, 0)

    def scores(self, count: int) -> Tensor:
        return torch.rand(count, generator=torch.Generator().manual_seed(self.seed))


@register
@dataclass(frozen=True, slots=True)
class NearestRows(_Control):
    """The rows nearest to the question: what layers with a window see."""

    name: ClassVar[str] = "nearest"

    def scores(self, count: int) -> Tensor:
        return torch.arange(count, dtype=torch.float32)
