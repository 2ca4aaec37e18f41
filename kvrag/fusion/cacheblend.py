"""CacheBlend: recompute the tokens whose KV deviates most (arXiv 2405.16444, sections 4.2, 4.3).

K and V of layer 0 depend on the token alone, so its stored values are exact and layer 1 is the
first that can tell. Layer 0 is therefore computed for every row that may be chosen, layer 1
projects them all and keeps those of highest deviation (HKVD), and each further layer compares
again and keeps a few less: a chain of subsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvrag.fusion.base import one_of, register
from kvrag.fusion.layerwise import LayerState, LayerwiseStrategy
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.selection import Choice, best

__all__ = ["CacheBlend", "rows_at"]

#: The first layer whose stored KV can differ from full prefill's.
CHECK_LAYER = 1
#: Layer 1 keeps this much more than the mean, the last layer as much less. The paper asks for
#: "slightly above" and gives no formula.
SPREAD = 0.3


def rows_at(layer: int, num_layers: int, ratio: float, selectable: int) -> int:
    """Rows that go on behind `layer`: linear from `ratio` × 1.3 down to × 0.7, mean `ratio`.

    Near 1 the slope flattens so that no layer asks for more than all rows and the mean stays.
    """
    last = num_layers - 1
    spread = 0.0 if last <= CHECK_LAYER or ratio == 0 else min(SPREAD, (1 - ratio) / ratio)
    place = 0.0 if last <= CHECK_LAYER else (layer - CHECK_LAYER) / (last - CHECK_LAYER)
    return round(ratio * (1 + spread * (1 - 2 * place)) * selectable)


@register
@dataclass(frozen=True, slots=True)
class CacheBlend(LayerwiseStrategy):
    """HKVD selection with gradual filtering; `ratio` 0 is plain reuse, 1 is full prefill.

    Args:
        deviation: of V, of K, or of both.

    Raises:
        InputError: see `FusionStrategy`; or the deviation is none of these.
    """

    deviation: Literal["v", "k", "kv"] = "v"

    name: ClassVar[str] = "cacheblend"
    tunable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        LayerwiseStrategy.__post_init__(self)
        one_of("deviation", self.deviation, ("v", "k", "kv"))

    def expected_rows(self, prompt: Prompt, layer: int, num_layers: int) -> float:
        candidates = len(self.candidates(prompt))
        if layer < CHECK_LAYER:
            return candidates
        return rows_at(layer, num_layers, self.ratio, candidates)

    def judges(self, layer: int, num_layers: int) -> bool:
        return layer >= CHECK_LAYER

    def narrow(self, state: LayerState) -> Choice:
        rows = rows_at(state.index, state.num_layers, self.ratio, state.candidates)
        return best(self.scores(state), rows)

    def scores(self, state: LayerState) -> Tensor:
        """KV deviation (m,): squared distance of fresh from stored, summed over the heads."""
        if self.deviation == "kv":
            return state.v_deviation() + state.k_deviation()
        return state.k_deviation() if self.deviation == "k" else state.v_deviation()
