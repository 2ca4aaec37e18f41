"""EPIC's LegoLink: recompute the first tokens of every chunk (arXiv 2410.15332, section 4).

A chunk computed alone takes its own first tokens for the beginning of everything and lets them
soak up attention. Which rows are repaired is known before anything is loaded, so nothing is spent
on choosing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrag.fusion.base import register, whole
from kvrag.fusion.layerwise import LayerwiseStrategy
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.selection import Choice

__all__ = ["Epic"]


@register
@dataclass(frozen=True, slots=True)
class Epic(LayerwiseStrategy):
    """The first `tokens` tokens of every chunk that may need repair; LegoLink-k.

    `ratio` 0 repairs nothing and `ratio` 1 everything; between them it has no meaning here.

    Args:
        tokens: of each chunk; the paper's choice is 2, and it tries up to 32.

    Raises:
        InputError: see `FusionStrategy`; or `tokens` is no whole number of 0 or more.
    """

    tokens: int = 2

    name: ClassVar[str] = "epic"

    def __post_init__(self) -> None:
        LayerwiseStrategy.__post_init__(self)
        whole("tokens", self.tokens, 0)

    def expected_rows(self, prompt: Prompt, layer: int, num_layers: int) -> float:
        candidates = self.candidates(prompt)
        if self.ratio == 1:
            return len(candidates)
        spans = [span for span in prompt.chunks if span.start in candidates]
        return sum(min(self.tokens, len(span.token_ids)) for span in spans)

    def begin(self, prompt: Prompt, candidates: range, attention: Tensor) -> Choice:
        offsets = torch.cat(
            [torch.arange(len(span.token_ids)) for span in prompt.chunks]
        )[-len(candidates) :]  # fmt: skip
        chosen = torch.ones_like(offsets) if self.ratio == 1 else offsets < self.tokens
        rows = chosen.nonzero()[:, 0].to(attention.device)
        return Choice(rows, chosen.float().to(attention.device))
