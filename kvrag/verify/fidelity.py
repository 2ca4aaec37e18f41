"""How near the blend is to full prefill on the text set: what errors of any kind add up to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

import torch

from kvrag.engine import Engine
from kvrag.fusion import FusionStrategy, Prompt, create
from kvrag.generation.kv_cache import KVCache
from kvrag.models.forward import append, extend
from kvrag.verify.bounds import (
    BLEND_KL,
    DEFAULT_AGAINST_REUSE,
    NEGLIGIBLE_KL,
    TRAINED_NLL,
)
from kvrag.verify.check import Check
from kvrag.verify.divergence import divergence, greedy_answer

__all__ = ["check_fidelity", "divergences"]

#: Tokens by which a model shows whether it was trained.
_TRIAL_TOKENS = 48


def check_fidelity(engine: Engine, prompts: Sequence[Prompt], new_tokens: int) -> Iterator[Check]:
    """Mean KL of plain reuse and of the engine's default strategy against bounds.

    The bounds are for trained models: random weights have no answer to be near to.
    """
    nll, chance = _nll(engine, prompts[0]), math.log(engine.model.decoder.config.vocab_size)
    if not nll < TRAINED_NLL * chance:
        sentence = (
            f"not measured: {nll:.1f} nats a token on plain English, where chance is "
            f"{chance:.1f}, so the weights are not trained for it"
        )
        yield Check.without_value("fidelity", "text set", sentence, passed=True)
        return
    default = engine.default_strategy
    reuse, blended = (
        fmean(values)
        for values in divergences(engine, prompts, new_tokens, [create("reuse"), default])
    )
    sentence = f"mean KL to full prefill, {new_tokens} tokens of {len(prompts)} answers"
    yield Check.of("fidelity", "reuse", reuse, BLEND_KL, sentence)
    if default.uses_blocks and default.name != "reuse":
        bound = min(BLEND_KL, max(NEGLIGIBLE_KL, DEFAULT_AGAINST_REUSE * reuse))
        yield Check.of("fidelity", default.name, blended, bound, sentence)


def divergences(
    engine: Engine, prompts: Sequence[Prompt], new_tokens: int, strategies: Sequence[FusionStrategy]
) -> list[list[float]]:
    """For each strategy, for each prompt: mean KL along full prefill's greedy answer, in nats."""
    measured: list[list[float]] = [[] for _ in strategies]
    for prompt in prompts:
        full = engine.fill(prompt, strategy="full", new_tokens=new_tokens)
        answer = greedy_answer(engine.model, full, new_tokens)
        truth = engine.continuation_logprobs(full, answer)
        for values, strategy in zip(measured, strategies, strict=True):
            other = engine.fill(prompt, strategy=strategy, new_tokens=new_tokens)
            logprobs = engine.continuation_logprobs(other, answer)
            values.append(float(divergence(truth, logprobs).mean()))
    return measured


@torch.inference_mode()
def _nll(engine: Engine, prompt: Prompt) -> float:
    """Nats a token of the beginning of the first chunk, behind the prefix."""
    decoder, token_ids = engine.model.decoder, prompt.chunks[0].token_ids[:_TRIAL_TOKENS]
    length = len(prompt.prefix_ids) + len(token_ids)
    cache = KVCache(decoder.config, length, dtype=decoder.compute_dtype, device=decoder.device)
    append(decoder, prompt.prefix_ids, cache)
    logprobs = extend(decoder, token_ids, cache, every=True).log_softmax(dim=-1)
    following = torch.tensor(token_ids[1:], device=decoder.device)
    return -float(logprobs[:-1].gather(1, following[:, None]).mean())
