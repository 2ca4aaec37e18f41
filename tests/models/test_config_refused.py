"""What a config says and is not done is refused, and the message names it."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.models.config import ModelConfig
from kvrag.models.families import FAMILIES
from kvrag.models.rope import inverse_frequencies
from tests.models.published import PUBLISHED
from tests.models.test_config import LLAMA3, config
from tests.models.tiny_models import FAMILIES as TINY
from tests.models.tiny_models import ROPES

#: What is no positive number.
NO_NUMBERS = [0, -1.0, math.nan, math.inf, "8", True, [8.0]]


def rope_of(family="llama", rope="default", **changes):
    """RoPE parameters of a tiny config, `changes` applied; None leaves an entry out."""
    made = config(family, rope)["rope_parameters"] | changes
    return {name: value for name, value in made.items() if value is not None}


def refused(raw, *words, **options):
    """The config is refused, and the message has all the words."""
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_hf(raw, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "family",
    [
        "ministral",
        "mixtral",
        "gemma",
        "gemma2",
        "gemma3n",
        "phi",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen2_vl",
        "olmo",
        "olmo3",
        "granitemoe",
        "cohere",
        "gpt2",
        "",
        None,
        7,
        ["llama"],
    ],
)
def test_family_refused_by_name(family):
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_hf(config() | {"model_type": family})
    assert repr(family) in str(caught.value)
    assert all(known in str(caught.value) for known in FAMILIES)


def test_supported_families():
    assert {kind for kind, _ in TINY.values()} | {"gemma3"} == set(FAMILIES)


def test_no_model_type_is_refused():
    with pytest.raises(UnsupportedModelError, match="None"):
        ModelConfig.from_hf(config(without=["model_type"]))


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["dynamic", "mrope", "su", "ntk", "proportional", "axial", 7])
def test_rope_type_refused_by_name(spelling, key, kind):
    broken = config(without=["rope_parameters"]) | {spelling: {key: kind, "factor": 2.0}}
    refused(broken, f"RoPE variant {kind!r}")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_dynamic_rope_is_refused_with_the_reason(family):
    """Its frequencies are those of one length: K stored in one prompt would not fit another."""
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    refused(
        config(family, without=["rope_parameters"]) | {"rope_scaling": dynamic},
        "'dynamic'",
        "frequencies depend on",
        "sequence",
        "stored K",
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("kinds", [("full_attention",), ("full_attention", "sliding_attention")])
def test_rope_parameters_by_layer_type_where_the_family_has_one(family, kinds):
    """Read flat, such a config has no `rope_theta`, and the model ran with 10000 instead."""
    nested = {kind: {"rope_type": "default", "rope_theta": 1e6} for kind in kinds}
    refused(config(family, rope_parameters=nested), "full_attention")


NEEDED = [
    ("linear", "factor"),
    ("llama3", "factor"),
    ("llama3", "low_freq_factor"),
    ("llama3", "high_freq_factor"),
]


@pytest.mark.parametrize(("kind", "name"), NEEDED)
def test_missing_rope_numbers_are_named(kind, name):
    refused(config(rope_parameters=rope_of("llama", kind, **{name: None})), name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *NEEDED,
        ("default", "rope_theta"),
        ("default", "partial_rotary_factor"),
        ("llama3", "original_max_position_embeddings"),
        ("yarn", "factor"),
        ("yarn", "original_max_position_embeddings"),
        ("yarn", "beta_fast"),
        ("yarn", "beta_slow"),
        ("yarn", "attention_factor"),
        ("longrope", "factor"),
        ("longrope", "attention_factor"),
        ("longrope", "original_max_position_embeddings"),
    ],
)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_impossible_rope_numbers_are_named(kind, name, value):
    """`from_hf` promises a typed error for a number that is impossible: NaN is no answer."""
    refused(config(rope_parameters=rope_of("llama", kind) | {name: value}), name)


@pytest.mark.parametrize("name", ["mscale", "mscale_all_dim"])
@pytest.mark.parametrize("value", [-1.0, math.nan, "1"])
def test_impossible_mscales_are_named(name, value):
    refused(config(rope_parameters=rope_of("llama", "yarn-mscale") | {name: value}), name)


@pytest.mark.parametrize(
    ("rope", "word"),
    [
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor"),
        (LLAMA3 | {"low_freq_factor": 5.0}, "low_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        (ROPES["yarn"] | {"truncate": "yes"}, "truncate"),
    ],
)
def test_rope_numbers_that_do_not_fit_are_named(rope, word):
    refused(config(rope_parameters={"rope_theta": 1e4} | rope), word)


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
@pytest.mark.parametrize(
    "value",
    [None, [], [1.0] * 3, [1.0] * 5, 2.0, "1111", [1, 1, 1, 0], [1, 1, 1, -1], [1, 1, 1, math.nan]],
    ids=repr,
)
def test_longrope_factors_that_are_wrong_are_named(name, value):
    length = 64 if name == "short_factor" else 65
    rope = config("phi3", "longrope")["rope_parameters"] | {name: value}
    refused(config("phi3", "longrope", rope_parameters=rope), name, context_length=length)


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_softcapping_is_refused(name):
    for family in ("gemma3", "llama"):
        refused(config(family) | {name: 30.0}, name)
    assert ModelConfig.from_hf(config("gemma3") | {name: None})


def test_softcapping_within_text_config_is_refused():
    raw = PUBLISHED["gemma-3-4b-it"]
    text = raw["text_config"] | {"attn_logit_softcapping": 50.0}
    refused(raw | {"text_config": text}, "attn_logit_softcapping")


def test_bidirectional_attention_is_refused():
    refused(config("gemma3") | {"use_bidirectional_attention": True}, "use_bidirectional_attention")


@pytest.mark.parametrize("text", [7, "gemma3_text", []])
def test_text_config_that_is_none(text):
    refused(PUBLISHED["gemma-3-4b-it"] | {"text_config": text}, "text_config")


@pytest.mark.parametrize("family", ["mistral", "mistral-window", "phi3"])
@pytest.mark.parametrize(
    "types",
    [
        ["sliding_attention", "full_attention"] * 2,
        ["full_attention"] * 3 + ["sliding_attention"],
    ],
)
def test_mistral_of_mixed_layers_is_refused(family, types):
    """Ministral is published as `mistral` with layer_types; transformers leaves them out."""
    refused(config(family) | {"layer_types": types}, "layer_types")


def test_mistral_whose_layer_types_say_something_else_is_refused():
    refused(config("mistral") | {"layer_types": ["sliding_attention"] * 4}, "layer_types")
    refused(config("mistral-window") | {"layer_types": ["full_attention"] * 4}, "layer_types")


WINDOWED = ["mistral-window", "qwen2-window", "qwen3-window", "smollm3-window", "gemma3"]


@pytest.mark.parametrize("family", [*WINDOWED, "phi3-window"])
@pytest.mark.parametrize("value", [0, -1, 7.5, "7", True, [7]], ids=repr)
def test_impossible_windows_are_named(family, value):
    refused(config(family) | {"sliding_window": value}, "sliding_window")


@pytest.mark.parametrize("family", WINDOWED[1:])
@pytest.mark.parametrize(
    "types",
    [
        ["full_attention"] * 3,
        ["full_attention"] * 9,
        ["sliding_attention"] * 3 + ["chunked_attention"],
        ["linear_attention"] * 4,
        [1, 0, 1, 0],
        ["full_attention", None, "full_attention", "full_attention"],
    ],
    ids=["short", "long", "chunked", "linear", "numbers", "null"],
)
def test_impossible_layer_types_are_named(family, types):
    refused(config(family) | {"layer_types": types}, "layer_types")


@pytest.mark.parametrize("flags", [[1, 1], [], [1, 1, 1, 2, 1], "11101", [1, 1, 1, None, 1]])
def test_impossible_no_rope_layers_are_named(flags):
    refused(config("smollm3") | {"no_rope_layers": flags}, "no_rope_layers")


@pytest.mark.parametrize("value", [0, -4, 2.5, "4"])
def test_impossible_patterns_are_named(value):
    raw = config("smollm3", without=["no_rope_layers"]) | {"no_rope_layer_interval": value}
    refused(raw, "no_rope_layer_interval")
    raw = config("gemma3", without=["layer_types"]) | {"sliding_window_pattern": value}
    refused(raw, "sliding_window_pattern")


@pytest.mark.parametrize(
    "name",
    ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"],
)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, "12", True], ids=repr)
def test_impossible_multipliers_are_named(name, value):
    refused(config("granite") | {name: value}, name)


@pytest.mark.parametrize("value", [0, -256, math.nan, "256"], ids=repr)
def test_impossible_query_scale_is_named(value):
    refused(config("gemma3") | {"query_pre_attn_scalar": value}, "query_pre_attn_scalar")


@pytest.mark.parametrize("family", ["llama", "phi3", "granite"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new", "swish2", 7])
def test_activation_is_refused(family, activation):
    refused(config(family, hidden_act=activation), f"activation {activation!r}")


def test_gemmas_activation_is_refused():
    refused(config("gemma3", hidden_activation="relu"), "activation 'relu'")


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("llama", {"eos_token_id": "2"}, "eos_token_id"),
        ("llama", {"eos_token_id": 2.0}, "eos_token_id"),
        ("llama", {"eos_token_id": True}, "eos_token_id"),
        ("llama", {"eos_token_id": [2, None]}, "eos_token_id"),
        ("llama", {"rope_scaling": "yarn"}, "rope_scaling"),
        ("llama", {"rope_scaling": True}, "rope_scaling"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters"),
        ("gemma3", {"rope_parameters": {"full_attention": True}}, "full_attention"),
        ("llama", {"layer_types": 7}, "layer_types"),
        ("qwen2-window", {"layer_types": 7}, "layer_types"),
        ("qwen2-window", {"layer_types": [["full_attention"]] * 4}, "layer_types"),
        ("smollm3", {"no_rope_layers": [[1]] * 5}, "no_rope_layers"),
    ],
)
def test_entries_of_another_kind_are_named(family, changes, name):
    """No number, list or object where one belongs: a typed error, not Python's own."""
    refused(config(family) | changes, name)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.floats()
    | st.sampled_from(["", "yarn", "full_attention", "silu", "1"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
#: Every family with the RoPEs that have the most entries, in both spellings.
FUZZED = [
    config("llama", "llama3"),
    config("mistral-window", "yarn-betas"),
    config("qwen2-window", "yarn-mscale"),
    config("smollm3-window", "longrope"),
    config("gemma3", "linear"),
    config("phi3-window", "partial-longrope"),
    config("granite"),
    *(PUBLISHED[name] for name in ("Llama-3.1-8B", "Phi-4-mini", "gemma-3-1b-it", "gemma-3-4b-it")),
    PUBLISHED["Qwen2.5-7B-Instruct with YaRN"],
]


def places(value, path=()):
    """Paths of all entries of an object, those of objects within it too."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from places(inner, (*path, key))


@settings(max_examples=400, deadline=None)
@given(data=st.data(), raw=st.sampled_from(FUZZED), value=JSON)
def test_any_value_anywhere_is_done_or_refused(data, raw, value):
    """A config.json may hold anything; what opens has finite angles and numbers."""
    path = data.draw(st.sampled_from(list(places(raw))))
    changed = copy.deepcopy(raw)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        made = ModelConfig.from_hf(changed)
    except ModelError as refusal:
        assert str(refusal)  # noqa: PT017
        return
    for name in ("norm_eps", "attention_scale", "embedding_scale", "residual_scale"):
        assert 0 < getattr(made, name) < math.inf
    for rope in {layer.rope for layer in made.layers} - {None}:
        assert bool(inverse_frequencies(rope).isfinite().all())
        assert 0 < rope.attention_factor < math.inf


@pytest.mark.parametrize("kind", ["yarn", "llama3", "longrope", "linear"])
@pytest.mark.parametrize("theta", [1, 1.0, 0.5, 1e-300, 1e308, 10**400], ids=lambda x: str(x)[:5])
def test_extreme_bases_are_done_or_refused(kind, theta):
    """YaRN divides by the logarithm of the base, which is 0 for 1."""
    raw = config(rope_parameters=rope_of("llama", kind) | {"rope_theta": theta})
    try:
        made = ModelConfig.from_hf(raw)
    except ModelError as refusal:
        assert "rope_theta" in str(refusal)  # noqa: PT017
        return
    assert bool(inverse_frequencies(made.layers[0].rope).isfinite().all())


@pytest.mark.parametrize("length", [0, -1, 513, 10**9])
def test_context_length_that_the_model_does_not_have(length):
    refused(config(), str(length), "512", context_length=length)


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


@pytest.mark.parametrize("family", [name for name in TINY if not name.startswith("phi3")])
def test_half_turned_heads_are_refused_where_the_familys_code_turns_whole_ones(family):
    refused(config(family) | {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "whole heads")


def test_scaling_beside_other_rope_parameters_is_refused():
    """transformers takes the one, others the other: neither is what the author can mean."""
    raw = config("qwen3")
    scaling = {"rope_type": "yarn", "factor": 4.0}
    refused(raw | {"rope_scaling": scaling}, "rope_scaling", "rope_parameters")
    both = raw | {"rope_scaling": dict(raw["rope_parameters"])}
    assert ModelConfig.from_hf(both) == ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "tie_word_embeddings"),
        ("llama", "attention_bias"),
        ("llama", "mlp_bias"),
        ("qwen2-window", "use_sliding_window"),
        ("gemma3", "use_bidirectional_attention"),
    ],
)
@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_a_flag_is_true_or_false(family, name, value):
    refused(config(family) | {name: value}, name, repr(value))


def test_the_text_part_is_of_the_models_family():
    raw = copy.deepcopy(PUBLISHED["gemma-3-4b-it"])
    raw["text_config"]["model_type"] = "llama"
    refused(raw, "text_config", "'llama'", "'gemma3'")


def test_yarn_reaches_further_than_the_config_says():
    raw = config("qwen2") | {
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }
    assert ModelConfig.from_hf(raw).max_positions == 64
    assert ModelConfig.from_hf(raw, context_length=256).max_positions == 256
    refused(raw, "257", "256", context_length=257)


@pytest.mark.parametrize("name", ["max_position_embeddings", "hidden_size", "vocab_size"])
def test_a_size_beyond_any_model_is_refused(name):
    refused(config("llama") | {name: 10**13}, name)
