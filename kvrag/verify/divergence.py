"""KL divergence along a greedy answer: what the gate and the fidelity benchmark both measure."""

from __future__ import annotations

from torch import Tensor

from kvrag.generation.decode import decode
from kvrag.generation.params import GenerationParams
from kvrag.models.source import Model
from kvrag.prefill import Prefilled

__all__ = ["divergence", "greedy_answer"]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence of `q` from `p`, log probabilities (n, vocab): (n,), in nats."""
    return (p.exp() * (p - q)).sum(dim=-1)


def greedy_answer(model: Model, prefilled: Prefilled, new_tokens: int) -> list[int]:
    """The greedy continuation, at least one token; the cache is left as it was."""
    params = GenerationParams(max_tokens=new_tokens)
    steps = decode(model, prefilled.cache, prefilled.logits, params)
    greedy = [step.token_id for step in steps if step.token_id is not None]
    prefilled.cache.truncate(prefilled.prompt.length)
    # An answer that ends at once still has its first distribution to compare.
    return greedy or [int(prefilled.logits.argmax())]
