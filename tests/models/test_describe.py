"""What a model is, in facts and sentences, from its config alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kvrag.models.config import LayerConfig, ModelConfig
from kvrag.models.describe import describe, layer_ranges, sentences
from kvrag.models.rope_config import ROPE_KINDS, RopeConfig

LOCAL = RopeConfig("default", 10_000.0, 64)
GLOBAL = RopeConfig("linear", 1_000_000.0, 64, factor=8.0)


def config(*layers: LayerConfig, **overrides) -> ModelConfig:
    raw = {
        "model_type": "llama", "hidden_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512,
        "num_hidden_layers": 1, "vocab_size": 1000, "max_position_embeddings": 4096,
    }  # fmt: skip
    return dataclasses.replace(ModelConfig.from_hf(raw), layers=layers, **overrides)


def mixed() -> ModelConfig:
    """As Gemma 3: every sixth layer sees all, the others a window, each with a RoPE of its own."""
    return config(
        *(LayerConfig(GLOBAL) if i % 6 == 5 else LayerConfig(LOCAL, window=512) for i in range(14))
    )


def test_facts_of_windows_and_rope():
    facts = describe(mixed(), kv_itemsize=2)
    per_layer = 2 * 2 * 64 * 2
    windowed = [i for i in range(14) if i % 6 != 5]
    assert facts == facts | {
        "family": "llama", "layers": 14, "heads": 4, "kv_heads": 2, "head_dim": 64,
        "hidden_size": 256, "mlp_size": 512, "vocab_size": 1000, "max_positions": 4096,
        "tied_embeddings": False, "kv_bytes_per_token": 14 * per_layer,
        "window_kv_bytes_per_token": 12 * per_layer, "global_layers": 2,
        "windows": [{"window": 512, "layers": windowed}], "layers_without_rope": [],
        "rope": [
            {"layers": windowed, "kind": "default", "theta": 10_000.0, "rotary_dim": 64},
            {
                "layers": [5, 11], "kind": "linear", "theta": 1_000_000.0, "rotary_dim": 64,
                "factor": 8.0,
            },
        ],
        "blending": True,
    }  # fmt: skip
    assert json.loads(json.dumps(facts)) == facts
    said = sentences(facts)
    assert said["windows"].splitlines() == [
        "2 of 14 layers see all tokens",
        "layers 0-4, 6-10, 12-13 see the last 512 tokens: chunks farther away cost nothing there",
    ]
    assert said["rope"].splitlines() == [
        "layers 0-4, 6-10, 12-13: default (theta 10000, rotary dim 64)",
        "layers 5, 11: linear (theta 1000000, rotary dim 64, factor 8)",
    ]
    assert said["blending"].startswith("yes")


def test_all_layers_with_a_window_and_none():
    every = describe(config(LayerConfig(LOCAL, 16), LayerConfig(LOCAL, 16)), kv_itemsize=4)
    assert every["window_kv_bytes_per_token"] == every["kv_bytes_per_token"]
    assert every["global_layers"] == 0
    assert sentences(every)["windows"].startswith("layers 0-1 see the last 16 tokens")
    none = describe(config(LayerConfig(LOCAL), LayerConfig(None)), kv_itemsize=4)
    assert (none["window_kv_bytes_per_token"], none["windows"]) == (0, [])
    assert none["layers_without_rope"] == [1]
    assert sentences(none)["windows"] == "2 of 2 layers see all tokens"
    assert sentences(none)["rope"].splitlines()[1] == "layer 1: none"


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_every_rope_variant_shows_its_numbers(kind):
    """A variant that is added without its numbers here would show a model's half."""
    rope = RopeConfig(
        kind, 500_000.0, 48, factor=7.0, low_freq_factor=1.5, high_freq_factor=3.5,
        original_max_positions=2048, beta_fast=33.0, beta_slow=2.0, truncate=False,
        attention_factor=1.125, stretch=(1.25, 9.5) * 12,
    )  # fmt: skip
    facts = describe(config(LayerConfig(rope)), kv_itemsize=2)
    (entry,) = facts["rope"]
    (said,) = sentences(facts)["rope"].splitlines()
    expected = {
        "default": [],
        "linear": ["factor 7"],
        "llama3": ["factor 7", "low freq factor 1.5", "high freq factor 3.5", "positions 2048"],
        "yarn": [
            "factor 7", "beta fast 33", "beta slow 2", "truncate no", "positions 2048",
            "attention factor 1.125",
        ],
        "longrope": ["positions 2048", "attention factor 1.125", "stretched by 1.25 to 9.5"],
    }[kind]  # fmt: skip
    assert said.startswith(f"layer 0: {kind} (theta 500000, rotary dim 48")
    assert all(part in said for part in expected)
    assert len(entry) == 4 + len(expected)
    for name, value in entry.items():
        if name != "layers":
            assert getattr(rope, name) == value


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([0], "0"),
        ([0, 1], "0-1"),
        ([0, 2, 4], "0, 2, 4"),
        ([3, 4, 5, 9, 11, 12], "3-5, 9, 11-12"),
        ([], ""),
    ],
)
def test_layer_ranges(layers, expected):
    assert layer_ranges(layers) == expected
