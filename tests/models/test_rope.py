"""Rotary tables against transformers' own, and their algebra."""

from __future__ import annotations

import pytest
import torch

from kvrag.models.config import ModelConfig, RopeConfig
from kvrag.models.rope import Rope, inverse_frequencies
from tests.models.tiny_models import tiny_config


def transformers_rope(config):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("theta", [1000.0, 10000.0, 100000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("rope", ["default", "llama3-64", "llama3-8192"])
def test_frequencies_and_tables_equal_transformers(theta, head_dim, rope):
    parameters = {"rope_type": "default", "rope_theta": theta}
    if rope != "default":
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": int(rope.removeprefix("llama3-")),
        }
    hf_config = tiny_config("llama", head_dim=head_dim, rope_parameters=parameters)
    config = ModelConfig.from_hf(hf_config.to_dict()).layers[0].rope
    module = transformers_rope(hf_config)
    if rope != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, scaling = ROPE_INIT_FUNCTIONS["llama3"](hf_config, torch.device("cpu"))
        assert scaling == 1.0
        assert torch.equal(module.inv_freq, inv_freq)
    ours = inverse_frequencies(config, head_dim)
    torch.testing.assert_close(ours, module.inv_freq, atol=0, rtol=5e-7)

    positions = torch.tensor([0, 1, 2, 100, 511])
    x = torch.randn(3, 5, head_dim, dtype=torch.float64)
    cos, sin = module(x, positions[None])
    half = head_dim // 2
    expected = x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
    table = Rope(config, head_dim, 512, dtype=torch.float64, device=torch.device("cpu"))
    # Angles are float32 and reach 511 radians: their last bit is 6e-5 / 2.
    torch.testing.assert_close(table.rotate(x, positions), expected, atol=2e-4, rtol=0)
    if rope == "default":
        torch.testing.assert_close(table.rotate(x, positions), expected, atol=1e-12, rtol=0)


def test_rotation_is_a_pure_function_of_the_position():
    """q·k depends on the distance alone: what lets a stored, un-rotated K go to any place."""
    config = RopeConfig("llama3", 1000.0, 8.0, 1.0, 4.0, 64)
    rope = Rope(config, 16, 400, dtype=torch.float64, device=torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(at_q, at_k):
        turned = rope.rotate(q, torch.tensor([at_q])) * rope.rotate(k, torch.tensor([at_k]))
        return float(turned.sum())

    assert score(30, 10) == pytest.approx(score(320, 300), abs=1e-4)
    assert score(30, 10) != pytest.approx(score(31, 10), abs=1e-3)
    assert torch.equal(rope.rotate(k, torch.tensor([0])), k)


def test_rotate_leaves_its_input():
    rope = Rope(RopeConfig("default", 1e4), 8, 4, dtype=torch.float32, device=torch.device("cpu"))
    k = torch.randn(2, 4, 8)
    before = k.clone()
    rope.rotate(k, torch.arange(4))
    assert torch.equal(k, before)
