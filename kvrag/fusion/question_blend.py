"""The presets `fast` and `true`: few rows, chosen by the question.

Three things make a recomputed row worth more than CacheBlend's (measurements: docs/fusion.md).

1. The question says where the cache matters (ProphetKV), the deviation where it is wrong: twice as
   many rows as wanted begin, those of highest question attention, and soon the half goes on for
   which attention times deviation is highest.
2. The attention is that of the middle layers, from a third to five sixths of the depth. The first
   ones look at neighbours, the last ones at the answer.
3. Rows stop at five sixths of the depth: what the last layers hold of the context hardly matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvrag.fusion.base import register, whole
from kvrag.fusion.layerwise import LayerState, LayerwiseStrategy
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.query_attention import global_layers
from kvrag.fusion.selection import Choice, best, share
from kvrag.models.decoder import Decoder

__all__ = ["Fast", "QuestionBlend", "TrueBlend"]

#: Rows that begin for one that goes on.
SPARE = 2.0


@dataclass(frozen=True, slots=True)
class QuestionBlend(LayerwiseStrategy):
    """`ratio` 0 is plain reuse, 1 is full prefill.

    Args:
        most_rows: an upper bound of the rows that go on, so that long prompts cost little more
            than their loading; 0 is none.

    Raises:
        InputError: see `FusionStrategy`; or `most_rows` is no whole number of 0 or more.
    """

    most_rows: int = 0

    tunable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        LayerwiseStrategy.__post_init__(self)
        whole("most_rows", self.most_rows, 0)

    def question_layers(self, decoder: Decoder, prompt: Prompt) -> Sequence[int]:
        if self.ratio == 1:
            return ()
        count = len(decoder.layers)
        seeing = global_layers(decoder, prompt)
        middle = [layer for layer in seeing if count // 3 <= layer < _stop(count)]
        return middle or seeing

    def begin(self, prompt: Prompt, candidates: range, attention: Tensor) -> Choice | None:
        if self.ratio == 1:
            return None
        rows = round(SPARE * self._rows(len(candidates)))
        return best(attention.mean(dim=0), rows)

    def expected_rows(self, prompt: Prompt, layer: int, num_layers: int) -> float:
        candidates = len(self.candidates(prompt))
        if self.ratio == 1:
            return candidates
        if layer >= _stop(num_layers):
            return 0
        rows = self._rows(candidates)
        return rows if layer >= _check(num_layers) else min(SPARE * rows, candidates)

    def judges(self, layer: int, num_layers: int) -> bool:
        return self.ratio < 1 and layer in (_check(num_layers), _stop(num_layers))

    def narrow(self, state: LayerState) -> Choice:
        scores = state.scores
        if scores is None:
            raise RuntimeError("rows of a question's blend have scores from their beginning")
        if state.index == _stop(state.num_layers):
            return best(scores, 0)
        return best(scores * state.v_deviation().sqrt(), self._rows(state.candidates))

    def _rows(self, candidates: int) -> int:
        rows = share(self.ratio, candidates)
        return min(rows, self.most_rows) if self.most_rows else rows


def _check(num_layers: int) -> int:
    """The layer in which deviation is asked: late enough to tell, early enough to save."""
    return max(1, num_layers // 10)


def _stop(num_layers: int) -> int:
    """The first layer behind which no context row is computed."""
    return -(-5 * num_layers // 6)


@register
@dataclass(frozen=True, slots=True)
class Fast(QuestionBlend):
    """The default: lower TTFT and nearer to full prefill than CacheBlend at 15 %."""

    ratio: float = 0.08
    most_rows: int = 192

    name: ClassVar[str] = "fast"


@register
@dataclass(frozen=True, slots=True)
class TrueBlend(QuestionBlend):
    """CacheBlend's time, spent on being nearer to full prefill."""

    ratio: float = 0.13

    name: ClassVar[str] = "true"
