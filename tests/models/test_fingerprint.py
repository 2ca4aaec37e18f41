"""The fingerprint of every family: what changes a token's KV changes it, and nothing else does.

tests/models/test_source.py has what concerns the files: damage, names, several weight files.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvrag.models.config import ModelConfig
from kvrag.models.fingerprint import model_fingerprint
from kvrag.models.folder import read_json
from kvrag.models.source import open_model
from kvrag.models.weights import Weights
from tests.models.published import PUBLISHED
from tests.models.test_config import transformers_config
from tests.models.tiny_models import FEW, make_tokenizer

FLOAT = torch.float32


@pytest.fixture(scope="module")
def weights(tiny):
    """Those of one model: what follows is about configs."""
    return Weights(tiny("llama"))


@pytest.fixture(scope="module")
def fingerprint(weights):
    def of(raw, context_length=None, tokenizer="tokenizer"):
        config = ModelConfig.from_hf(raw, context_length=context_length)
        return model_fingerprint(config, weights, tokenizer, FLOAT, FLOAT)

    return of


def raw_of(tiny, family, rope):
    return read_json(tiny(family, rope) / "config.json")


def with_rope(raw, **changes):
    rope = raw["rope_parameters"] | changes
    rope = {name: value for name, value in rope.items() if value is not None}
    return raw | {"rope_parameters": rope}


# ---- what changes it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rope", "change"),
    [
        ("llama", "default", {"rope_theta": 1000.5}),
        ("llama", "linear", {"factor": 8.5}),
        ("llama", "linear", {"rope_type": "default"}),
        ("llama", "llama3", {"factor": 8.5}),
        ("llama", "llama3", {"low_freq_factor": 1.01}),
        ("llama", "llama3", {"high_freq_factor": 4.01}),
        ("llama", "llama3", {"original_max_position_embeddings": 65}),
        ("qwen2", "yarn", {"factor": 4.5}),
        ("qwen2", "yarn", {"original_max_position_embeddings": 129}),
        ("qwen2", "yarn", {"beta_fast": 31.0}),
        ("qwen2", "yarn", {"beta_slow": 1.1}),
        ("qwen2", "yarn", {"truncate": False}),
        ("qwen2", "yarn", {"attention_factor": 1.1}),
        ("qwen3", "yarn-mscale", {"mscale": 0.71}),
        ("qwen3", "yarn-mscale", {"mscale_all_dim": 1.31}),
        ("qwen3", "yarn-mscale", {"mscale_all_dim": None}),
        ("phi3", "partial", {"partial_rotary_factor": 0.5}),
        ("phi3", "longrope", {"long_factor": [1.1, 1.9, 4.5, 9.5]}),
        ("phi3", "longrope-short", {"short_factor": [1.0, 1.05, 1.3, 2.5]}),
        ("phi3", "longrope-short", {"factor": 4.5}),
        ("llama", "longrope", {"attention_factor": 1.1}),
        ("llama", "longrope", {"original_max_position_embeddings": 65}),
    ],
)
def test_each_rope_parameter(tiny, fingerprint, family, rope, change):
    raw = raw_of(tiny, family, rope)
    assert fingerprint(with_rope(raw, **change)) != fingerprint(raw)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("change", [{"rope_theta": 7.0}, {"rope_type": "linear", "factor": 9.0}])
def test_the_rope_of_each_layer_type(tiny, fingerprint, kind, change):
    raw = raw_of(tiny, "gemma3", "linear")
    rope = raw["rope_parameters"]
    changed = raw | {"rope_parameters": rope | {kind: rope[kind] | change}}
    assert fingerprint(changed) != fingerprint(raw)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mistral-window", {"sliding_window": 17}),
        ("mistral-window", {"sliding_window": None}),
        ("phi3-window", {"sliding_window": 15}),
        ("qwen2-window", {"sliding_window": 8}),
        ("qwen2-window", {"use_sliding_window": False}),
        ("qwen2-window", {"layer_types": ["sliding_attention"] * 4}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}),
        ("smollm3", {"no_rope_layers": [1] * 5}),
        (
            "smollm3-window",
            {"layer_types": ["full_attention"] * 3 + ["sliding_attention", "full_attention"]},
        ),
        ("gemma3", {"sliding_window": 8}),
        ("gemma3", {"layer_types": ["sliding_attention"] * 7}),
        ("gemma3", {"query_pre_attn_scalar": 21}),
        ("gemma3", {"hidden_activation": "silu"}),
        ("gemma3", {"rms_norm_eps": 2e-5}),
        ("granite", {"embedding_multiplier": 6.01}),
        ("granite", {"attention_multiplier": 0.22}),
        ("granite", {"residual_multiplier": 0.38}),
        ("granite", {"logits_scaling": 2.6}),
        ("olmo2", {"model_type": "llama"}),
    ],
)
def test_each_option_of_a_family(tiny, fingerprint, family, change):
    raw = raw_of(tiny, family, "default")
    assert fingerprint(raw | change) != fingerprint(raw)


@pytest.mark.parametrize(("family", "rope"), FEW)
def test_one_bit_of_any_kind_of_weight(tiny, tmp_path, family, rope):
    """The last bit of one number, in one tensor of each kind that the family has."""
    raw = raw_of(tiny, family, rope)
    folder = tiny(family, rope)
    config = ModelConfig.from_hf(raw)

    def of(path):
        return model_fingerprint(config, Weights(path), "tokenizer", FLOAT, FLOAT)

    made = {of(folder)}
    tensors = load_file(folder / "model.safetensors")
    last = f".{config.num_layers - 1}."
    names = [name for name in tensors if ".layers." not in name or last in name]
    for name in names:
        changed = {other: tensor.clone() for other, tensor in tensors.items()}
        changed[name].view(torch.int32).view(-1)[-1] ^= 1
        target = tmp_path / name
        target.mkdir()
        save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
        made.add(of(target))
    assert len(made) == len(names) + 1


@pytest.mark.parametrize(("family", "rope"), [("gemma3", "linear"), ("phi3-window", "default")])
def test_tokenizer_and_dtype_of_an_opened_model(tiny, tmp_path, family, rope):
    folder = shutil.copytree(tiny(family, rope), tmp_path / "model")

    def opened(dtype=torch.float32):
        return open_model(str(folder), tmp_path, dtype=dtype).fingerprint

    made = [opened(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    assert opened() == made[0]
    make_tokenizer(folder, vocab_size=390)
    made.append(opened())
    assert len(set(made)) == 4


def test_longrope_of_a_short_and_a_long_context(tiny, fingerprint):
    """Their K is turned differently; V and later layers of the same tokens differ with it."""
    raw = raw_of(tiny, "phi3", "longrope")
    short, shorter = fingerprint(raw, context_length=64), fingerprint(raw, context_length=9)
    long, longer = fingerprint(raw, context_length=65), fingerprint(raw)
    assert short == shorter
    assert long == longer
    assert short != long


# ---- what does not -------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rope"), FEW)
@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": [1, 2]},
        {"eos_token_id": None},
        {"bos_token_id": 1, "pad_token_id": None},
        {"torch_dtype": "bfloat16", "dtype": None},
        {"architectures": ["SomethingElse"]},
        {"transformers_version": "4.40.0", "use_cache": False, "_name_or_path": "elsewhere"},
        {"initializer_range": 0.5, "attention_dropout": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_no_kv(tiny, fingerprint, family, rope, change):
    """Another stop token must not cost the whole store."""
    raw = raw_of(tiny, family, rope)
    assert fingerprint(raw | change) == fingerprint(raw)


@pytest.mark.parametrize(("family", "rope"), [v for v in FEW if v[1] != "partial-longrope"])
def test_a_longer_context(tiny, fingerprint, family, rope):
    raw = raw_of(tiny, family, rope)
    assert fingerprint(raw | {"max_position_embeddings": 600}) == fingerprint(raw)
    assert fingerprint(raw, context_length=100) == fingerprint(raw)


def test_a_longer_context_of_longrope(tiny, fingerprint):
    """With a factor of its own; without one the ratio of the contexts is the factor."""
    raw = with_rope(raw_of(tiny, "llama", "longrope"), factor=8.0)
    assert fingerprint(raw | {"max_position_embeddings": 600}) == fingerprint(raw)
    ratio = with_rope(raw, factor=None)
    assert fingerprint(ratio) == fingerprint(raw)
    assert fingerprint(ratio | {"max_position_embeddings": 600}) != fingerprint(raw)


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_spellings(fingerprint, name):
    """A model that transformers 5 has saved anew is the same model."""
    raw = PUBLISHED[name]
    new = transformers_config(raw).to_dict() | {"model_type": raw["model_type"]}
    assert fingerprint(new) == fingerprint(raw)


def test_entries_that_say_what_holds_anyway(tiny, fingerprint):
    raw = raw_of(tiny, "qwen2-window", "default")
    types = {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}
    plain = {name: value for name, value in raw.items() if name != "layer_types"}
    assert fingerprint(plain) == fingerprint(plain | types) == fingerprint(raw)
    off = raw | {"use_sliding_window": False}
    assert fingerprint(off | {"sliding_window": 5, "max_window_layers": 1}) == fingerprint(off)
    raw = raw_of(tiny, "llama", "yarn")
    betas = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
    assert fingerprint(with_rope(raw, **betas)) == fingerprint(raw)
