"""Decoding one sequence: a token at a time out of the KV cache, and its text as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvrag.generation.graph import GraphedDecoding, Step, eager_steps
from kvrag.generation.kv_cache import KVCache
from kvrag.generation.params import GenerationParams
from kvrag.generation.sampling import Sampler
from kvrag.generation.stopping import StopTexts
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
    graphed: GraphedDecoding | None = None,
) -> Iterator[Token]:
    """Continue the prompt in `cache`, whose last token has `logits` (1, vocab).

    The end-of-sequence token ends the answer and is not part of it.

    Args:
        graphed: how steps run; `cache` may then stay as it is. None appends to `cache`.
    """
    sampler = Sampler(params, logits.device)
    text, stops = model.tokenizer.stream(), StopTexts(params.stop)
    # Positions that are left for new tokens.
    room = model.decoder.config.max_positions - cache.length
    step: Step | None = None
    with ExitStack() as using:
        for count in range(1, params.max_tokens + 1):
            token_id = sampler.sample(logits[-1])
            if token_id in model.eos_token_ids:
                yield Token(None, stops.flush(), "stop")
                return
            piece = stops.push(text.push(token_id))
            if stops.found:
                yield Token(token_id, piece, "stop")
                return
            if count == params.max_tokens or count > room:
                yield Token(token_id, piece + stops.flush(), "length")
                return
            yield Token(token_id, piece)
            if cancelled():
                yield Token(None, stops.flush(), "cancelled")
                return
            if step is None:
                # Behind the first token: whoever waits for it need not wait for a capture.
                step = eager_steps(model.decoder.stepping, cache)
                if graphed is not None:
                    step = using.enter_context(graphed.steps(cache, params.max_tokens))
            logits = step(token_id)
