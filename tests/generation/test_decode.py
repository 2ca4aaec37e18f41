"""Decoding out of the cache against a whole prefill for each token, and every way to end."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvrag.generation.decode import decode
from kvrag.generation.kv_cache import KVCache
from kvrag.generation.params import GenerationParams
from kvrag.generation.sampling import Sampler
from kvrag.models.forward import extend
from kvrag.models.source import open_model
from tests.models.tiny_models import reference_model, token_ids

CPU = torch.device("cpu")
PROMPT = token_ids(30)


@pytest.fixture(scope="module")
def model(tiny):
    folder = tiny("qwen3", "llama3")
    opened = open_model(str(folder), folder, dtype=torch.float64)
    return dataclasses.replace(opened, eos_token_ids=frozenset())


def prefilled(model, ids=PROMPT, capacity=1):
    cache = KVCache(model.decoder.config, capacity, dtype=torch.float64, device=CPU)
    return cache, extend(model.decoder, ids, cache)


def run(model, ids=PROMPT, *, cancelled=lambda: False, **params):
    return list(decode(model, *prefilled(model, ids), GenerationParams(**params), cancelled))


def said(steps):
    return [step.token_id for step in steps if step.token_id is not None]


def text(steps):
    return "".join(step.text for step in steps)


def test_greedy_equals_a_prefill_for_each_token(model, tiny):
    hf = reference_model(tiny("qwen3", "llama3"))
    ids = list(PROMPT)
    for _ in range(40):
        with torch.inference_mode():
            ids.append(int(hf(torch.tensor([ids])).logits[0, -1].argmax()))
    assert said(run(model, max_tokens=40)) == ids[len(PROMPT) :]


def test_sampled_equals_a_prefill_for_each_token(model):
    params = GenerationParams(max_tokens=25, temperature=0.8, top_k=50, top_p=0.9, seed=11)
    sampler, ids = Sampler(params, CPU), list(PROMPT)
    for _ in range(25):
        ids.append(sampler.sample(prefilled(model, ids)[1][-1]))
    steps = run(model, max_tokens=25, temperature=0.8, top_k=50, top_p=0.9, seed=11)
    assert said(steps) == ids[len(PROMPT) :]


def test_text_is_that_of_the_tokens(model):
    steps = run(model, max_tokens=60)
    whole = model.tokenizer.decode(said(steps))
    assert whole.startswith(text(steps))
    assert set(whole[len(text(steps)) :]) <= {"\ufffd"}
    assert [step.finish_reason for step in steps] == [None] * 59 + ["length"]


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens(model, max_tokens):
    steps = run(model, max_tokens=max_tokens)
    assert len(said(steps)) == max_tokens
    assert steps[-1].finish_reason == "length"


def test_end_of_sequence_is_no_part_of_the_answer(model):
    ids = said(run(model, max_tokens=30))
    ending = ids[10]
    first = ids.index(ending)
    model = dataclasses.replace(model, eos_token_ids=frozenset([ending, 399]))
    steps = run(model, max_tokens=30)
    assert said(steps) == ids[:first]
    assert (steps[-1].token_id, steps[-1].finish_reason) == (None, "stop")


def test_end_of_sequence_at_once(model):
    (first,) = said(run(model, max_tokens=1))
    model = dataclasses.replace(model, eos_token_ids=frozenset([first]))
    (step,) = run(model, max_tokens=5)
    assert (step.token_id, step.text, step.finish_reason) == (None, "", "stop")


def test_stop_text_across_tokens(model):
    """Every text of the answer as a stop text, within a token and across several."""
    steps = run(model, max_tokens=25)
    whole = text(steps)
    for begin in range(0, len(whole) - 1, 3):
        for length in (1, 2, 5, 9):
            stop = whole[begin : begin + length]
            stopped = run(model, max_tokens=25, stop=(stop,))
            assert text(stopped) == whole[: whole.index(stop)]
            assert stopped[-1].finish_reason == "stop"
            assert said(stopped) == said(steps)[: len(said(stopped))]
            # No further than the token that completes the stop text.
            assert stop not in text(steps[: len(said(stopped)) - 1])


def test_stop_text_that_never_comes_loses_nothing(model):
    steps = run(model, max_tokens=25)
    whole = text(steps)
    for tail in (whole[-1], whole[-3:], whole[-7:]):
        assert text(run(model, max_tokens=25, stop=(tail + "§never",))) == whole


@pytest.mark.parametrize("after", [0, 1, 5])
def test_cancelled_between_tokens(model, after):
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) > after

    steps = run(model, max_tokens=25, cancelled=cancelled)
    assert steps[-1].finish_reason == "cancelled"
    assert said(steps) == said(run(model, max_tokens=25))[: after + 1]


def test_cancelled_text_is_what_the_tokens_say(model):
    """Text held back for a stop text that did not come is given out at the end."""
    full = run(model, max_tokens=3)
    stop = text(full)[-1:] + "§"
    asked = iter([False, False, True])
    steps = run(model, max_tokens=9, stop=(stop,), cancelled=lambda: next(asked))
    assert text(steps) == text(run(model, max_tokens=3))


@pytest.mark.parametrize("room", [0, 1, 5])
def test_end_of_the_context(model, room):
    """The last token said may lie behind the last position: nothing is computed for it."""
    limit = model.decoder.config.max_positions
    steps = run(model, token_ids(limit - room), max_tokens=20)
    assert len(said(steps)) == room + 1
    assert steps[-1].finish_reason == "length"


def test_cache_holds_all_but_the_last_token(model):
    cache, logits = prefilled(model)
    steps = list(decode(model, cache, logits, GenerationParams(max_tokens=6)))
    assert cache.length == len(PROMPT) + 5
    again, _ = prefilled(model, [*PROMPT, *said(steps)[:-1]])
    for ours, theirs in zip(cache.k, again.k, strict=True):
        torch.testing.assert_close(
            ours[:, : cache.length], theirs[:, : cache.length], atol=1e-9, rtol=0
        )


def test_nothing_runs_until_the_next_token_is_asked_for(model):
    cache, logits = prefilled(model)
    tokens = decode(model, cache, logits, GenerationParams(max_tokens=6))
    assert cache.length == len(PROMPT)
    next(tokens)
    next(tokens)
    assert cache.length == len(PROMPT) + 1
    tokens.close()
