"""Rotary tables against transformers' own and against the papers' formulas, and their algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvrag.models.config import ModelConfig, RopeConfig
from kvrag.models.rope import Rope, inverse_frequencies
from tests.models.tiny_models import tiny_config

CPU = torch.device("cpu")
NUMBERS = st.floats(1.0, 64.0)


def rope_config(hf_config, context_length=None) -> RopeConfig:
    return ModelConfig.from_hf(hf_config.to_dict(), context_length=context_length).layers[0].rope


def hf_config(rope_type, *, head_dim, theta=10000.0, max_positions=4096, **parameters):
    """A config with a RoPE; Phi-3's code is the one that knows partial rotation."""
    partial = parameters.get("partial_rotary_factor")
    rope = {"rope_type": rope_type, "rope_theta": theta} | parameters
    given_factors = {name: value for name, value in rope.items() if value is not None}
    return tiny_config(
        "llama" if partial is None else "phi3",
        hidden_size=head_dim * 4,
        max_position_embeddings=max_positions,
        original_max_position_embeddings=parameters.get("original_max_position_embeddings", 4096),
        rope_parameters=given_factors,
        **({"head_dim": head_dim} if partial is None else {}),
    )


def check_as_transformers(config, context_length=None):
    """Frequencies to rounding, and the factor of the cosines, which is exact."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = rope_config(config, context_length)
    expected, factor = ROPE_INIT_FUNCTIONS[ours.kind](config, CPU, seq_len=context_length)
    frequencies = inverse_frequencies(ours)
    assert frequencies.dtype is torch.float32
    torch.testing.assert_close(frequencies, expected, atol=0, rtol=5e-7)
    assert ours.attention_factor == pytest.approx(factor, rel=1e-12)
    return ours


@pytest.mark.parametrize("theta", [1000.0, 10000.0, 100000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("partial", [None, 0.5, 0.75])
def test_tables_equal_transformers(theta, head_dim, partial):
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

    hf = hf_config("default", head_dim=head_dim, theta=theta, partial_rotary_factor=partial)
    config, module = rope_config(hf), Phi3RotaryEmbedding(hf)
    assert config == RopeConfig("default", theta, int(head_dim * (partial or 1)))
    torch.testing.assert_close(inverse_frequencies(config), module.inv_freq, atol=0, rtol=0)
    positions = torch.tensor([0, 1, 2, 100, 511])
    x = torch.randn(3, 5, head_dim, dtype=torch.float64)
    cos, sin = module(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin)
    table = Rope(config, 512, dtype=torch.float64, device=CPU)
    torch.testing.assert_close(table.rotate(x, positions), expected[0], atol=1e-12, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    theta=st.floats(100.0, 1e7),
    head_dim=st.sampled_from([8, 10, 64, 128]),
    factor=NUMBERS,
    low=st.floats(0.5, 8.0),
    more=st.floats(0.5, 8.0),
    original=st.integers(8, 10000),
)
def test_linear_and_llama3_frequencies(theta, head_dim, factor, low, more, original):
    shape = {"head_dim": head_dim, "theta": theta, "max_positions": 20000}
    check_as_transformers(hf_config("linear", factor=factor, **shape))
    check_as_transformers(
        hf_config(
            "llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=low + more,
            original_max_position_embeddings=original,
            **shape,
        )
    )


@settings(max_examples=150, deadline=None)
@given(
    theta=st.floats(100.0, 1e7),
    head_dim=st.sampled_from([8, 10, 64, 128]),
    factor=NUMBERS,
    original=st.integers(8, 10000),
    beta_slow=st.none() | st.floats(0.25, 4.0),
    beta_fast=st.none() | st.floats(4.0, 64.0),
    truncate=st.none() | st.booleans(),
    mscale=st.none() | st.floats(0.1, 2.0),
    mscale_all_dim=st.none() | st.floats(0.1, 2.0),
    attention_factor=st.none() | st.floats(0.5, 2.0),
)
def test_yarn_frequencies(theta, head_dim, factor, original, **options):
    config = hf_config(
        "yarn",
        head_dim=head_dim,
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        max_positions=20000,
        **options,
    )
    # With bounds that fall together the ramp is a step, whose side a last bit may decide.
    assume(not _step(config))
    check_as_transformers(config)


def _step(config) -> bool:
    rope, dim = config.rope_parameters, config.head_dim

    def turns_at(rotations):
        length = rope["original_max_position_embeddings"]
        return (
            dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))
        )

    low, high = turns_at(rope.get("beta_fast") or 32), turns_at(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return min(high, dim - 1) - max(low, 0) < 0.01


@pytest.mark.parametrize("head_dim", [8, 96])
@pytest.mark.parametrize("partial", [None, 0.75])
@pytest.mark.parametrize("factor", [None, 1.0, 16.0])
@pytest.mark.parametrize("attention_factor", [None, 1.19])
@pytest.mark.parametrize("length", [64, 65])
def test_longrope_frequencies(head_dim, partial, factor, attention_factor, length):
    pairs = int(head_dim * (partial or 1)) // 2
    config = hf_config(
        "longrope",
        head_dim=head_dim,
        max_positions=1024,
        original_max_position_embeddings=64,
        partial_rotary_factor=partial,
        factor=factor,
        attention_factor=attention_factor,
        short_factor=[1 + 0.1 * i for i in range(pairs)],
        long_factor=[2 + 0.5 * i for i in range(pairs)],
    )
    assert check_as_transformers(config, length).rotary_dim == 2 * pairs


def test_yarn_by_the_paper():
    """arXiv 2309.00071, section 3.2: what turns often is kept, what turns rarely stretched.

    A dimension turns `original / wavelength` times within the original context; below beta_slow it
    is divided by the factor, above beta_fast kept, between them a share of each. transformers'
    ramp is linear in the dimension, not in the number of turns, which the ends do not show.
    """
    config = RopeConfig(
        "yarn", 1e4, 128, factor=8.0, original_max_positions=4096, beta_fast=32.0, beta_slow=1.0
    )
    plain = inverse_frequencies(RopeConfig("default", 1e4, 128)).double()
    made = inverse_frequencies(config).double()
    turns = 4096 * plain / (2 * math.pi)
    torch.testing.assert_close(made[turns > 36], plain[turns > 36], atol=0, rtol=1e-6)
    torch.testing.assert_close(made[turns < 0.9], plain[turns < 0.9] / 8, atol=0, rtol=1e-6)
    share = (made / plain)[(turns >= 0.9) & (turns <= 36)]
    assert len(share) > 20
    assert bool((share.diff() < 1e-6).all())
    assert float(share.min()) >= 1 / 8 - 1e-6
    assert float(share.max()) <= 1 + 1e-6


def test_llama3_by_definition():
    """Wavelengths above original / low are stretched by the factor, below original / high kept."""
    config = RopeConfig(
        "llama3",
        5e5,
        128,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    for plain, made in zip(
        inverse_frequencies(RopeConfig("default", 5e5, 128)).double().tolist(),
        inverse_frequencies(config).double().tolist(),
        strict=True,
    ):
        turns = 8192 * plain / (2 * math.pi)
        blend = min(max((turns - 1) / 3, 0), 1)
        assert made == pytest.approx(plain * (blend + (1 - blend) / 8), rel=1e-5)


KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "original_max_positions": 64},
    "yarn": {"factor": 4.0, "original_max_positions": 128, "beta_fast": 6.0},
    "longrope": {"stretch": (1.0, 1.5, 2.0, 5.0, 6.0, 9.0)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rotation_is_a_pure_function_of_the_position(kind, factor):
    """q·k depends on the distance alone: what lets a stored, un-rotated K go to any place."""
    config = RopeConfig(kind, 1000.0, 12, attention_factor=factor, **KINDS[kind])
    rope = Rope(config, 400, dtype=torch.float64, device=CPU)
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=generator)

    def score(at_q, at_k):
        turned = rope.rotate(q, torch.tensor([at_q])) * rope.rotate(k, torch.tensor([at_k]))
        return float(turned.sum())

    assert score(30, 10) == pytest.approx(score(320, 300), abs=1e-4)
    assert score(30, 10) != pytest.approx(score(31, 10), abs=1e-3)
    # Cosines and sines carry the factor; the last four dimensions are not turned and do not.
    at_0 = rope.rotate(k, torch.tensor([0]))
    torch.testing.assert_close(at_0[..., :12], k[..., :12] * factor, atol=1e-6, rtol=0)
    assert torch.equal(rope.rotate(k, torch.tensor([399]))[..., 12:], k[..., 12:])


@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_rotate_leaves_its_input(rotary_dim):
    rope = Rope(RopeConfig("default", 1e4, rotary_dim), 4, dtype=torch.float32, device=CPU)
    k = torch.randn(2, 4, 8)
    before = k.clone()
    turned = rope.rotate(k, torch.arange(4))
    assert torch.equal(k, before)
    turned.zero_()
    assert torch.equal(k, before)


def test_a_table_grows_with_what_is_asked_of_it():
    """And gives the same numbers in whatever order it grew."""
    config = RopeConfig("default", 1e4, 8)

    def table(length):
        made = Rope(config, 100_000, dtype=torch.float32, device=CPU)
        made.reserve(length)
        return made

    x = torch.randn(2, 3, 8)
    far = torch.tensor([1, 9_000, 99_999])
    near = torch.tensor([0, 1, 8_191])
    grown = table(1)
    first = grown.rotate(x, near)
    grown.rotate(x, slice(9_000, 9_003))
    grown.reserve(100_000)
    assert torch.equal(grown.rotate(x, far), table(100_000).rotate(x, far))
    assert torch.equal(grown.rotate(x, near), first)
    assert grown.rotate(x[:, :0], far[:0]).shape == (2, 0, 8)
    for beyond in (far + 1, slice(99_998, 100_001)):
        with pytest.raises(IndexError):
            grown.rotate(x, beyond)
    with pytest.raises(IndexError):
        grown.reserve(100_001)
