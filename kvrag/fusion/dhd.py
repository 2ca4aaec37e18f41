"""KVShare's selector of the prefill stage: attention received times deviation of V.

DHD (arXiv 2503.16525 version 2, "dual-stage high deviation", stage one): a token's score is the sum
of its column of the attention matrix times the L1 norm of the difference of its stored from its
fresh V. K is left out since both find nearly the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvrag.fusion.base import register
from kvrag.fusion.cacheblend import CHECK_LAYER
from kvrag.fusion.layerwise import LayerState, LayerwiseStrategy
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.selection import Choice, best, share

__all__ = ["Dhd"]


@register
@dataclass(frozen=True, slots=True)
class Dhd(LayerwiseStrategy):
    """Layer 0 and layer 1's attention for every row; behind layer 1 `ratio` of the rows go on."""

    name: ClassVar[str] = "dhd"
    tunable: ClassVar[bool] = True

    def expected_rows(self, prompt: Prompt, layer: int, num_layers: int) -> float:
        candidates = len(self.candidates(prompt))
        return candidates if layer < CHECK_LAYER else share(self.ratio, candidates)

    def judges(self, layer: int, num_layers: int) -> bool:
        return layer == CHECK_LAYER

    def narrow(self, state: LayerState) -> Choice:
        deviation = (state.v - state.stored_v).abs().sum(dim=(0, 2))
        return best(state.received() * deviation, share(self.ratio, state.candidates))
