"""Decoding one sequence: a token at a time out of the KV cache, and its text as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvrag.generation.kv_cache import KVCache
from kvrag.generation.params import GenerationParams
from kvrag.generation.sampling import Sampler
from kvrag.generation.stopping import StopTexts
from kvrag.models.forward import extend
from kvrag.models.source import Model

__all__ = ["FinishReason", "Token", "decode"]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Token:
    """One step of an answer.

    token_id: None in a last step that brings no token. text: what became certain with this step;
    may be empty, or belong to earlier tokens. finish_reason: set in the last step.
    """

    token_id: int | None
    text: str
    finish_reason: FinishReason | None = None


def decode(
    model: Model,
    cache: KVCache,
    logits: Tensor,
    params: GenerationParams,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Token]:
    """Continue the prompt in `cache`, whose last token has `logits` (1, vocab).

    The end-of-sequence token ends the answer and is not part of it.
    """
    sampler = Sampler(params, logits.device)
    text, stops = model.tokenizer.stream(), StopTexts(params.stop)
    for count in range(1, params.max_tokens + 1):
        token_id = sampler.sample(logits[-1])
        if token_id in model.eos_token_ids:
            yield Token(None, stops.flush(), "stop")
            return
        piece = stops.push(text.push(token_id))
        if stops.found:
            yield Token(token_id, piece, "stop")
            return
        if count == params.max_tokens or cache.length >= model.decoder.config.max_positions:
            yield Token(token_id, piece + stops.flush(), "length")
            return
        yield Token(token_id, piece)
        if cancelled():
            yield Token(None, stops.flush(), "cancelled")
            return
        logits = extend(model.decoder.stepping, [token_id], cache)
