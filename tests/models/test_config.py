"""What a config says is done exactly; test_config_refused.py has what is not done."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from kvrag.errors import UnsupportedModelError
from kvrag.models.config import ModelConfig, RopeConfig
from kvrag.models.config_values import token_id_list
from kvrag.models.rope import inverse_frequencies
from tests.models.published import PUBLISHED
from tests.models.tiny_models import FAMILIES as TINY
from tests.models.tiny_models import ROPES, VARIANTS, tiny_config

LLAMA3 = {"rope_theta": 500000.0} | ROPES["llama3"]


def config(family="llama", rope="default", *, without=(), **changes):
    """config.json of a tiny model as transformers 5 writes it, `changes` applied."""
    content = tiny_config(family, rope).to_dict() | changes
    return {name: value for name, value in content.items() if name not in without}


# ---- published configs ---------------------------------------------------------------------------


def transformers_config(raw):
    """What transformers makes of a config.json, its text part."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(dict(raw)))
    return made.get_text_config()


def transformers_layers(theirs):
    """Window, whether there is RoPE, and layer type, layer by layer, as their modules read them."""
    count = theirs.num_hidden_layers
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    windows = [window if types is None or t == "sliding_attention" else None for t in types or [0]]
    if types is None:
        windows *= count
    rope = [bool(flag) for flag in getattr(theirs, "no_rope_layers", [1] * count)]
    return list(zip(windows, rope, types or [None] * count, strict=True))


def transformers_frequencies(theirs, layer_type, length):
    """Inverse frequencies and factor of cosines that a sequence of this length gets."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    nested = theirs.model_type == "gemma3_text"
    rope = theirs.rope_parameters[layer_type] if nested else theirs.rope_parameters
    by_type = {"layer_type": layer_type} if nested else {}
    if rope["rope_type"] != "default":
        init = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        return init(theirs, torch.device("cpu"), seq_len=length, **by_type)
    module = Gemma3RotaryEmbedding if nested else Phi3RotaryEmbedding
    return module.compute_default_rope_parameters(theirs, **by_type)


def check_as_transformers(raw):
    ours, theirs = ModelConfig.from_hf(raw), transformers_config(raw)
    assert ours.family == raw["model_type"]
    assert ours.hidden_size == theirs.hidden_size
    assert ours.mlp_size == theirs.intermediate_size
    assert ours.vocab_size == theirs.vocab_size
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    layers = transformers_layers(theirs)
    assert [layer.window for layer in ours.layers] == [window for window, _, _ in layers]
    assert [layer.rope is not None for layer in ours.layers] == [has for _, has, _ in layers]
    for layer, (_, _, layer_type) in zip(ours.layers, layers, strict=True):
        if layer.rope is None:
            continue
        expected, factor = transformers_frequencies(theirs, layer_type, ours.max_positions)
        frequencies = inverse_frequencies(layer.rope)
        torch.testing.assert_close(frequencies, expected, atol=0, rtol=5e-7)
        assert layer.rope.attention_factor == pytest.approx(factor, rel=1e-12)
        assert layer.rope.rotary_dim == 2 * len(expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_what_transformers_reads(name):
    check_as_transformers(PUBLISHED[name])


@pytest.mark.parametrize(("family", "rope"), VARIANTS)
def test_the_newest_spelling_means_what_transformers_reads(family, rope):
    check_as_transformers(config(family, rope))


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings_give_one_config(name):
    """transformers 5 writes a published config anew: nested, renamed and with all defaults."""
    raw = PUBLISHED[name]
    new = transformers_config(raw).to_dict()
    assert "rope_parameters" in new
    assert "rope_theta" not in new
    old, made = ModelConfig.from_hf(raw), ModelConfig.from_hf(new)
    assert made.layers == old.layers
    ignored = ("family", "eos_token_ids")
    for field in old.__dataclass_fields__:
        assert field in ignored or getattr(made, field) == getattr(old, field), field


@pytest.mark.parametrize("kind", ["su", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_names_of_longrope(kind, key):
    """Phi-3's first uploads called it so; transformers 5.23 fails on them, 4 read them."""
    raw = PUBLISHED["Phi-3-mini-128k"]
    factors = {k: v for k, v in raw["rope_scaling"].items() if k != "type"}
    old = ModelConfig.from_hf(raw | {"rope_scaling": {key: kind} | factors})
    assert old == ModelConfig.from_hf(raw)
    assert old.layers[0].rope.kind == "longrope"


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("Mistral-7B-v0.1", {4096: 32}),
        ("Mistral-Nemo", {None: 40}),
        ("Qwen2.5-7B-Instruct", {None: 28}),
        ("Qwen2.5 with windows", {None: 21, 32768: 7}),
        ("gemma-3-1b-it", {512: 22, None: 4}),
        ("gemma-3-270m", {512: 15, None: 3}),
        ("gemma-3-4b-it", {1024: 29, None: 5}),
        ("Phi-3-mini-4k", {2047: 32}),
    ],
)
def test_windows_by_the_numbers(name, windows):
    layers = ModelConfig.from_hf(PUBLISHED[name]).layers
    counted = {}
    for layer in layers:
        counted[layer.window] = counted.get(layer.window, 0) + 1
    assert counted == windows


def test_ropes_by_the_numbers():
    smollm3 = ModelConfig.from_hf(PUBLISHED["SmolLM3-3B"]).layers
    assert [i for i, layer in enumerate(smollm3) if layer.rope is None] == list(range(3, 36, 4))
    gemma = ModelConfig.from_hf(PUBLISHED["gemma-3-4b-it"]).layers
    assert gemma[0].rope == RopeConfig("default", 1e4, 256)
    assert gemma[5].rope == RopeConfig("linear", 1e6, 256, factor=8.0)
    yarn = ModelConfig.from_hf(PUBLISHED["Qwen2.5-7B-Instruct with YaRN"]).layers[0].rope
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert (yarn.kind, yarn.factor, yarn.original_max_positions) == ("yarn", 4.0, 32768)
    phi = ModelConfig.from_hf(PUBLISHED["Phi-4-mini"])
    assert (phi.head_dim, phi.layers[0].rope.rotary_dim) == (128, 96)
    assert phi.layers[0].rope.attention_factor == pytest.approx(math.sqrt(1 + 5 / 12))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(
    "name", ["rms_norm_eps", "tie_word_embeddings", "sliding_window", "head_dim"]
)
def test_an_absent_entry_is_the_familys_default(family, name):
    """A config.json may leave out what its family's class has by default."""
    raw = config(family, without=[name, "rope_parameters"])
    try:
        ours = ModelConfig.from_hf(raw)
    except UnsupportedModelError as refusal:
        assert name in str(refusal)  # noqa: PT017
        return
    theirs = transformers_config(raw)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    windows = [window for window, _, _ in transformers_layers(theirs)]
    assert [layer.window for layer in ours.layers] == windows
    thetas = {layer.rope.theta for layer in ours.layers if layer.rope}
    rope = theirs.rope_parameters
    kinds = [rope[kind] for kind in rope] if family.startswith("gemma3") else [rope]
    assert thetas == {kind["rope_theta"] for kind in kinds}


# ---- longrope and the context length -------------------------------------------------------------


def test_longrope_is_chosen_once_by_the_context_length():
    raw = PUBLISHED["Phi-3-mini-128k"]
    made = {n: ModelConfig.from_hf(raw, context_length=n) for n in (1, 4096, 4097, 131072)}
    factors = raw["rope_scaling"]
    for length, model in made.items():
        name = "long_factor" if length > 4096 else "short_factor"
        assert model.layers[0].rope.stretch == tuple(factors[name])
        assert model.max_positions == length
        # The magnitude is the model's, whatever part of its context is used.
        assert model.layers[0].rope.attention_factor == pytest.approx(math.sqrt(1 + 5 / 12))
    assert ModelConfig.from_hf(raw) == made[131072]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3-window"])
def test_context_length_of_other_ropes_only_limits(family):
    whole, part = (ModelConfig.from_hf(config(family), context_length=n) for n in (None, 100))
    assert (whole.max_positions, part.max_positions) == (512, 100)
    assert whole.layers == part.layers


# ---- what a family fixes, and defaults -----------------------------------------------------------


def test_defaults_and_spellings():
    plain = ModelConfig.from_hf(
        config(without=["rope_parameters", "head_dim", "num_key_value_heads"], rope_theta=5e5)
        | {"rope_scaling": None, "eos_token_id": [2, 7]}
    )
    assert plain.num_kv_heads == plain.num_heads == 4
    assert plain.head_dim == 8
    assert plain.layers == (plain.layers[0],) * 4
    assert plain.layers[0].rope == RopeConfig("default", 5e5, 8)
    assert plain.eos_token_ids == (2, 7)
    new = ModelConfig.from_hf(config(rope_parameters=LLAMA3))
    old = ModelConfig.from_hf(
        config(without=["rope_parameters"])
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"rope_theta": 500000.0}}
    )
    assert new == old
    assert new.kv_elements_per_token == 2 * 4 * 2 * 8


@pytest.mark.parametrize(
    ("family", "biases", "qk_norm", "activation"),
    [
        ("llama", (False, False, False), None, "silu"),
        ("llama-bias", (True, True, True), None, "silu"),
        ("mistral", (False, False, False), None, "silu"),
        ("qwen2", (True, False, False), None, "silu"),
        ("qwen3", (False, False, False), "head", "silu"),
        ("qwen3-window", (True, True, False), "head", "silu"),
        ("smollm3-window", (True, True, True), None, "silu"),
        ("gemma3", (False, False, False), "head", "gelu_pytorch_tanh"),
        ("phi3", (False, False, False), None, "silu"),
        ("olmo2-bias", (True, True, False), "all_heads", "silu"),
        ("granite-bias", (True, True, True), None, "silu"),
    ],
)
def test_what_a_family_has(family, biases, qk_norm, activation):
    made = ModelConfig.from_hf(config(family))
    assert (made.qkv_bias, made.output_bias, made.mlp_bias) == biases
    assert (made.qk_norm, made.activation) == (qk_norm, activation)


def test_scales_by_the_numbers():
    granite = ModelConfig.from_hf(PUBLISHED["granite-3.1-2b-instruct"])
    assert (granite.embedding_scale, granite.attention_scale) == (12.0, 0.015625)
    assert (granite.residual_scale, granite.logits_scaling) == (0.22, 8.0)
    gemma = ModelConfig.from_hf(PUBLISHED["gemma-3-27b-it"])
    assert gemma.attention_scale == pytest.approx(168**-0.5)
    assert gemma.embedding_scale == pytest.approx(5376**0.5)
    # Entries of one family mean nothing in another.
    llama = ModelConfig.from_hf(
        config() | {"embedding_multiplier": 2.0, "query_pre_attn_scalar": 3, "logits_scaling": 4.0}
    )
    assert (llama.embedding_scale, llama.attention_scale) == (1.0, 8**-0.5)
    assert (llama.residual_scale, llama.logits_scaling) == (1.0, 1.0)


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (0, (0,)), ([1, 2], (1, 2)), ([], ())])
def test_token_id_list(value, ids):
    assert token_id_list(value) == ids
