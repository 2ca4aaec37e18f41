"""What a config says is done exactly, or refused by name."""

from __future__ import annotations

import pytest

from kvrag.errors import UnsupportedModelError
from kvrag.models.config import FAMILIES, ModelConfig, RopeConfig, token_id_list
from tests.models.tiny_models import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(family="llama", *, without=(), **changes):
    content = tiny_config(family).to_dict() | changes
    return {name: value for name, value in content.items() if name not in without}


@pytest.mark.parametrize(
    "family",
    [
        "mistral",
        "mixtral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "qwen2_moe",
        "qwen3_moe",
        "qwen2_vl",
        "smollm3",
        "granite",
        "cohere",
        "olmo2",
        "gpt2",
        "",
        None,
        7,
    ],
)
def test_family_refused_by_name(family):
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_hf(config() | {"model_type": family})
    assert repr(family) in str(caught.value)
    assert all(known in str(caught.value) for known in FAMILIES)


def test_no_model_type_is_refused():
    with pytest.raises(UnsupportedModelError, match="None"):
        ModelConfig.from_hf(config(without=["model_type"]))


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "mrope", "su", "ntk"])
def test_rope_type_refused_by_name(spelling, key, kind):
    broken = config(without=["rope_parameters"]) | {spelling: {key: kind, "factor": 2.0}}
    with pytest.raises(UnsupportedModelError, match=f"RoPE variant '{kind}'"):
        ModelConfig.from_hf(broken)


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor"])
def test_llama3_without_a_parameter_names_it(name):
    rope = {key: value for key, value in LLAMA3.items() if key != name}
    with pytest.raises(UnsupportedModelError, match=name):
        ModelConfig.from_hf(config(rope_parameters=rope))


@pytest.mark.parametrize(
    ("rope", "problem"),
    [
        (LLAMA3 | {"high_freq_factor": 1.0}, "a division by zero: every frequency is NaN"),
        (LLAMA3 | {"factor": 0.0}, "a division by zero"),
        (LLAMA3 | {"factor": "eight"}, "no number"),
        ({"rope_type": "default", "rope_theta": "much"}, "no number"),
        ({"rope_type": "default", "rope_theta": 0.0}, "infinite frequencies"),
    ],
)
def test_impossible_rope_numbers_are_refused(rope, problem):
    """`from_hf` promises a typed error for a number that is impossible: NaN is no answer."""
    with pytest.raises(UnsupportedModelError):
        ModelConfig.from_hf(config(rope_parameters=rope))


def test_rope_parameters_by_layer_type_are_refused():
    """transformers 5 can nest `rope_parameters` by layer type; the default RoPE is not meant then.

    Read flat, such a config has no `rope_theta`, and the model ran with 10000 instead.
    """
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(UnsupportedModelError):
        ModelConfig.from_hf(config(rope_parameters=nested))


@pytest.mark.parametrize("where", ["config", "rope"])
def test_partial_rotary_is_refused(where):
    broken = config()
    (broken if where == "config" else broken["rope_parameters"])["partial_rotary_factor"] = 0.5
    with pytest.raises(UnsupportedModelError, match="partial"):
        ModelConfig.from_hf(broken)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 64},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_window_is_refused(family, changes):
    with pytest.raises(UnsupportedModelError, match=r"sliding.*" + family):
        ModelConfig.from_hf(config(family) | changes)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh", None])
def test_activation_is_refused(activation):
    with pytest.raises(UnsupportedModelError, match=f"activation {activation!r}"):
        ModelConfig.from_hf(config(hidden_act=activation))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_weights_are_refused(method):
    with pytest.raises(UnsupportedModelError, match="quantised"):
        ModelConfig.from_hf(config(quantization_config={"quant_method": method}))


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [None, 0, -1, 2.5, "32", True])
def test_sizes_are_named(name, value):
    with pytest.raises(UnsupportedModelError, match=f"{name} is {value!r}"):
        ModelConfig.from_hf(config() | {name: value})


def test_heads_must_divide():
    with pytest.raises(UnsupportedModelError, match="num_key_value_heads 3"):
        ModelConfig.from_hf(config(num_key_value_heads=3))


def test_an_odd_head_dim_is_refused():
    """A rotation pairs the two halves of a head; with 9 dimensions it fails in the first layer."""
    with pytest.raises(UnsupportedModelError, match="head_dim"):
        ModelConfig.from_hf(config(head_dim=9))


def test_defaults_and_spellings():
    plain = ModelConfig.from_hf(
        config(without=["rope_parameters", "head_dim", "num_key_value_heads"], rope_theta=5e5)
        | {"rope_scaling": None, "eos_token_id": [2, 7]}
    )
    assert plain.num_kv_heads == plain.num_heads == 4
    assert plain.head_dim == 8
    assert plain.layers == (plain.layers[0],) * 4
    assert plain.layers[0].rope == RopeConfig("default", 5e5)
    assert plain.eos_token_ids == (2, 7)
    new = ModelConfig.from_hf(config(rope_parameters=LLAMA3))
    old = ModelConfig.from_hf(
        config(without=["rope_parameters"])
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"rope_theta": 500000.0}}
    )
    assert new == old
    assert new.kv_elements_per_token == 2 * 4 * 2 * 8


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", (False, False, False, False)),
        ("llama-bias", (True, True, True, False)),
        ("qwen2", (True, False, False, False)),
        ("qwen3", (False, False, False, True)),
    ],
)
def test_what_a_family_has(family, flags):
    made = ModelConfig.from_hf(config(family))
    assert (made.qkv_bias, made.output_bias, made.mlp_bias, made.qk_norm) == flags


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (0, (0,)), ([1, 2], (1, 2)), ([], ())])
def test_token_id_list(value, ids):
    assert token_id_list(value) == ids
