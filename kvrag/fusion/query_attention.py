"""Recompute the tokens that the question attends to.

ProphetKV: the question's rows alone run over the stored KV; the attention that each context token
receives, averaged over heads, rows and layers, says how much it matters to this question.
CacheClip (window grouping): chosen tokens that stand alone are of little use to one another, so
whole windows are kept where most of a window was chosen, and loners dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrag.fusion.base import register, whole
from kvrag.fusion.layerwise import LayerwiseStrategy
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.selection import Choice, best, share
from kvrag.models.decoder import Decoder

__all__ = ["QueryAttention", "global_layers", "grouped"]


def global_layers(decoder: Decoder, prompt: Prompt) -> list[int]:
    """The layers in which the question sees the whole prompt; all if there is none.

    Elsewhere a token outside the window would score nothing, whatever it matters.
    """
    last = prompt.length - 1
    seeing = [layer.index for layer in decoder.layers if layer.first_visible(last) == 0]
    return seeing or list(range(len(decoder.layers)))


def grouped(choice: Choice, window: int, least: int) -> Choice:
    """Whole windows of `window` neighbours in which at least `least` were chosen.

    Where no window has so many, the choice stays as it is.
    """
    chosen = torch.zeros(len(choice.scores), device=choice.scores.device)
    chosen[choice.rows] = 1
    if len(chosen) < window:
        return choice
    dense = (chosen.unfold(0, window, 1).sum(dim=-1) >= least).nonzero()[:, 0]
    if not len(dense):
        return choice
    kept = torch.zeros(len(chosen), dtype=torch.bool, device=chosen.device)
    kept[(dense[:, None] + torch.arange(window, device=chosen.device)).flatten()] = True
    return Choice(kept.nonzero()[:, 0], choice.scores)


@register
@dataclass(frozen=True, slots=True)
class QueryAttention(LayerwiseStrategy):
    """`ratio` of the context rows, those of highest attention, chosen before the first layer.

    Args:
        window: 0 takes the best tokens one by one; else windows of so many neighbours (CacheClip
            has 8), kept where at least five eighths of them were chosen. Then the share of rows
            is only near `ratio`.

    Raises:
        InputError: see `FusionStrategy`; or the window is no whole number of 0 or more.
    """

    window: int = 0

    name: ClassVar[str] = "query_attention"
    tunable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        LayerwiseStrategy.__post_init__(self)
        whole("window", self.window, 0)

    def question_layers(self, decoder: Decoder, prompt: Prompt) -> Sequence[int]:
        return global_layers(decoder, prompt)

    def begin(self, prompt: Prompt, candidates: range, attention: Tensor) -> Choice:
        choice = best(attention.mean(dim=0), share(self.ratio, len(candidates)))
        if not self.window or self.ratio == 1:
            return choice
        return grouped(choice, self.window, -(-5 * self.window // 8))
