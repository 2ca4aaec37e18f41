"""From logits to the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrag.generation.params import GenerationParams

__all__ = ["Sampler"]


class Sampler:
    """Greedy, or temperature, then top-k, then top-p (Holtzman et al., arXiv 1904.09751).

    Holds the random generator of one request.
    """

    def __init__(self, params: GenerationParams, device: torch.device) -> None:
        self._params = params
        self._generator = torch.Generator(device=device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def sample(self, logits: Tensor) -> int:
        """A token id from logits (vocab,)."""
        params = self._params
        if params.temperature == 0:
            return int(logits.argmax())
        # Shifted first, and in float64: a tiny temperature must neither overflow nor vanish.
        wide = logits.double()
        probs = ((wide - wide.max()) / params.temperature).softmax(dim=-1)
        if params.top_k or params.top_p < 1:
            count = min(params.top_k or len(probs), len(probs))
            probs, order = probs.topk(count)
            if params.top_p < 1:
                # A token stays while those before it have not reached the share yet.
                before = probs.cumsum(dim=-1) - probs
                probs = probs.masked_fill(before >= params.top_p * probs.sum(), 0.0)
            return int(order[torch.multinomial(probs, 1, generator=self._generator)])
        return int(torch.multinomial(probs, 1, generator=self._generator))
