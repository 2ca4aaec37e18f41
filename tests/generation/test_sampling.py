"""Sampling against the distribution written out slowly, and its parameters."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrag.errors import InputError
from kvrag.generation.params import GenerationParams
from kvrag.generation.sampling import Sampler

CPU = torch.device("cpu")


def sampler(**params):
    return Sampler(GenerationParams(**params), CPU)


def distribution(logits, temperature, top_k, top_p):
    """Temperature, then top-k, then top-p, in Python numbers: token id → probability."""
    highest = max(logits)
    weights = {i: math.exp((logit - highest) / temperature) for i, logit in enumerate(logits)}
    ranked = sorted(weights, key=weights.__getitem__, reverse=True)
    if top_k:
        ranked = ranked[:top_k]
    total = sum(weights[i] for i in ranked)
    kept, reached = [], 0.0
    for i in ranked:
        if reached >= top_p * total and kept:
            break
        kept.append(i)
        reached += weights[i]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 1, 1.0),
        (1.0, 100, 1.0),
        (1.0, 0, 0.6),
        (1.0, 0, 0.9),
        (1.0, 4, 0.75),
        (0.7, 5, 0.5),
        (1.0, 0, 1e-9),
    ],
)
def test_frequencies(temperature, top_k, top_p):
    logits = [2.0, -1.0, 0.5, 1.5, 1.2, -3.0, 0.0]
    expected = distribution(logits, temperature, top_k, top_p)
    drawn = sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=7)
    n = 4000
    counts = Counter(drawn.sample(torch.tensor(logits)) for _ in range(n))
    assert set(counts) <= set(expected)
    for token, probability in expected.items():
        # Five standard deviations: the seed is fixed, and so is the outcome.
        bound = 5 * math.sqrt(probability * (1 - probability) / n) + 1e-9
        assert counts[token] / n == pytest.approx(probability, abs=bound)


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=20, unique=True),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.integers(0, 25),
    top_p=st.sampled_from([0.05, 0.3, 0.8, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)
def test_nothing_outside_the_set_is_drawn(logits, temperature, top_k, top_p, seed):
    options = {"temperature": temperature, "top_k": top_k}
    # The border of the set may move by the rounding of float32 sums.
    allowed = distribution(logits, **options, top_p=min(1.0, top_p + 1e-5))
    drawn = sampler(**options, top_p=top_p, seed=seed)
    for _ in range(5):
        assert drawn.sample(torch.tensor(logits)) in allowed


@given(logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30))
def test_greedy_is_the_first_of_the_highest(logits):
    token = sampler(temperature=0, top_k=2, top_p=0.1).sample(torch.tensor(logits))
    assert logits[token] == max(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "temperature", [1e-2, 1e-6, 1e-30, 1e-38, 1e-40, 1e-46, 1e-300, 5e-324, math.ulp(0.0)]
)
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_tiny_temperature_is_greedy(dtype, temperature, options):
    """Any temperature above 0 is allowed; divided by one of 1e-39 and less, 0 became NaN."""
    logits = torch.tensor([1.0, 3.0, 2.0, -1e4, 1e4 - 1, 1e4], dtype=dtype)
    assert sampler(temperature=temperature, **options).sample(logits) == 5


@pytest.mark.parametrize("temperature", [1e3, 1e30, 1e39, 1e308])
def test_huge_temperature_is_uniform(temperature):
    drawn = sampler(temperature=temperature, seed=1)
    counts = Counter(drawn.sample(torch.tensor([0.0, 5.0, -5.0])) for _ in range(600))
    assert min(counts[i] for i in range(3)) > 140


@pytest.mark.parametrize("top_p", [1e-30, 1e-40, 1e-46, 1e-300, 5e-324])
def test_tiny_top_p_is_greedy(top_p):
    """Rounded to float32 the share became 0, nothing was left, and sampling failed."""
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sampler(temperature=1.0, top_p=top_p).sample(logits) == 1


def test_logits_of_minus_infinity_are_never_drawn():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0])
    for options in ({}, {"top_k": 3}, {"top_p": 0.99}):
        drawn = sampler(temperature=5.0, seed=3, **options)
        assert {drawn.sample(logits) for _ in range(50)} == {1, 3}


def test_seeds():
    logits = torch.zeros(1000)

    def draw(seed):
        drawn = sampler(temperature=1.0, seed=seed)
        return [drawn.sample(logits) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(0) == draw(0)
    assert draw(2**63 - 1) == draw(2**63 - 1)
    assert draw(None) != draw(None)


def test_sampling_leaves_the_global_generator_and_the_logits():
    logits = torch.randn(50)
    before, state = logits.clone(), torch.get_rng_state()
    for options in ({"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.5}):
        sampler(**options, seed=5).sample(logits)
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), state)


# ---- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("x", "")),
        ("stop", (5,)),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=f"{name} is"):
        GenerationParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 2.5),
        ("max_tokens", "5"),
        ("max_tokens", None),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_p", "0.5"),
        ("top_p", None),
        ("top_k", 1.5),
        ("top_k", None),
        ("seed", 1.5),
        ("seed", "7"),
        ("stop", 5),
    ],
)
def test_values_of_a_wrong_type_are_named(name, value):
    """2.5 tokens passed the check and failed in the decoding loop; a text raised TypeError."""
    with pytest.raises(InputError, match=f"{name} is"):
        GenerationParams(**{name: value})


@given(
    max_tokens=st.integers(1, 10**9),
    temperature=st.floats(0, 1e300),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(0, 10**9),
    seed=st.one_of(st.none(), st.integers(0, 2**63 - 1)),
    stop=st.lists(st.text(min_size=1), max_size=3),
)
@example(max_tokens=1, temperature=0, top_p=1, top_k=0, seed=None, stop=[])
def test_values_in_range_are_taken(max_tokens, temperature, top_p, top_k, seed, stop):
    GenerationParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop),
    )
