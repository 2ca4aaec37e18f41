"""What each model family fixes in its code and does not write into config.json.

Families differ by this table, not by subclass. What is not in it is refused by name, because a
model that is nearly right answers wrongly without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvrag.errors import UnsupportedModelError
from kvrag.models.config_values import flag, size

__all__ = ["FAMILIES", "FULL", "SLIDING", "Family", "Norms", "family_of"]

#: Names of layer types in Hugging Face configs.
FULL, SLIDING = "full_attention", "sliding_attention"

LayerTypes = Callable[[Mapping[str, Any], int], list[str]]


@dataclass(frozen=True, slots=True)
class Norms:
    """Where a layer has RMS norms, by the names of their weights; None where it has none."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


_BEFORE = Norms("input_layernorm", None, "post_attention_layernorm", None)
_AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_AROUND = Norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _all_full(config: Mapping[str, Any], layers: int) -> list[str]:
    return [FULL] * layers


def _all_sliding(config: Mapping[str, Any], layers: int) -> list[str]:
    return [FULL if config.get("sliding_window") is None else SLIDING] * layers


def _qwen(config: Mapping[str, Any], layers: int) -> list[str]:
    if not flag(config, "use_sliding_window") or config.get("sliding_window") is None:
        return [FULL] * layers
    if config.get("layer_types"):
        return _given(config, layers)
    # May be 0: all slide.
    first = config.get("max_window_layers")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise UnsupportedModelError(
            f"max_window_layers is {first!r} in the model's config; a whole number is needed"
        )
    return [SLIDING if layer >= first else FULL for layer in range(layers)]


def _smollm3(config: Mapping[str, Any], layers: int) -> list[str]:
    if not flag(config, "use_sliding_window") or config.get("sliding_window") is None:
        return [FULL] * layers
    if config.get("layer_types"):
        return _given(config, layers)
    return [FULL if turns else SLIDING for turns in _turning(config, layers)]


def _gemma3(config: Mapping[str, Any], layers: int) -> list[str]:
    if config.get("layer_types"):
        return _given(config, layers)
    pattern = size(config, "sliding_window_pattern", 6)
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]


def _given(config: Mapping[str, Any], layers: int) -> list[str]:
    types = config["layer_types"]
    if (
        not isinstance(types, list)
        or len(types) != layers
        or not all(kind in (FULL, SLIDING) for kind in types)
    ):
        raise UnsupportedModelError(
            f"layer_types is {types!r}; a list of {layers} times {FULL!r} or {SLIDING!r}, one "
            "a layer, is needed"
        )
    return list(types)


def _all_turn(config: Mapping[str, Any], layers: int) -> list[bool]:
    return [True] * layers


def _turning(config: Mapping[str, Any], layers: int) -> list[bool]:
    """SmolLM3's `no_rope_layers` says 1 where a layer *has* RoPE."""
    flags = config.get("no_rope_layers")
    if flags is None:
        interval = size(config, "no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    # transformers accepts a list that is longer than the model.
    if (
        not isinstance(flags, list)
        or len(flags) < layers
        or not all(flag in (0, 1) for flag in flags)
    ):
        raise UnsupportedModelError(
            f"no_rope_layers is {flags!r}; a list of at least {layers} zeros and ones is needed"
        )
    return [bool(flag) for flag in flags[:layers]]


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table.

    Args:
        norms: where a layer has norms.
        norm_offset: added to every norm weight.
        qk_norm: norm of Q and K over each head, over all heads together, or none.
        fused_weights: one tensor holds Q, K and V, another gate and up.
        attention_bias: "config" for the entry `attention_bias`, "qkv" for all but the output.
        mlp_bias: whether the entry `mlp_bias` is read.
        layer_types: full or sliding attention, layer by layer.
        reads_layer_types: whether the entry `layer_types` may say so.
        turning: which layers have RoPE.
        partial_rope: whether `partial_rotary_factor` may turn a part of each head.
        local_rope: sliding layers have RoPE parameters of their own.
        embedding_scale: "hidden": the square root of the hidden size; "config": the entry
            `embedding_multiplier`.
        attention_scale: the entry that gives the scale of the scores; `query_pre_attn_scalar` is
            taken to the power -1/2. None: head_dim to the power -1/2.
        multipliers: whether `residual_multiplier` and `logits_scaling` are read.
        defaults: entries that a config.json may leave out.
    """

    norms: Norms = _BEFORE
    norm_offset: float = 0.0
    qk_norm: Literal["head", "all_heads"] | None = None
    fused_weights: bool = False
    attention_bias: Literal["config", "qkv"] | None = "config"
    mlp_bias: bool = False
    layer_types: LayerTypes = _all_full
    reads_layer_types: bool = False
    turning: Callable[[Mapping[str, Any], int], list[bool]] = _all_turn
    partial_rope: bool = False
    local_rope: bool = False
    embedding_scale: Literal["hidden", "config"] | None = None
    attention_scale: Literal["query_pre_attn_scalar", "attention_multiplier"] | None = None
    multipliers: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA3 = Family(
    norms=_AROUND,
    norm_offset=1.0,
    qk_norm="head",
    layer_types=_gemma3,
    reads_layer_types=True,
    local_rope=True,
    embedding_scale="hidden",
    attention_scale="query_pre_attn_scalar",
    # The text part of a multimodal config names only what differs from these.
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
)

_QWEN_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}

#: By `model_type`.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(mlp_bias=True),
    "mistral": Family(
        attention_bias=None, layer_types=_all_sliding, defaults={"sliding_window": 4096}
    ),
    "qwen2": Family(
        attention_bias="qkv", layer_types=_qwen, reads_layer_types=True, defaults=_QWEN_DEFAULTS
    ),
    "qwen3": Family(
        qk_norm="head",
        layer_types=_qwen,
        reads_layer_types=True,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    "smollm3": Family(
        mlp_bias=True,
        layer_types=_smollm3,
        reads_layer_types=True,
        turning=_turning,
        defaults={"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    ),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi3": Family(
        fused_weights=True,
        attention_bias=None,
        partial_rope=True,
        layer_types=_all_sliding,
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "olmo2": Family(norms=_AFTER, qk_norm="all_heads", defaults={"rms_norm_eps": 1e-5}),
    "granite": Family(
        mlp_bias=True,
        embedding_scale="config",
        attention_scale="attention_multiplier",
        multipliers=True,
    ),
}


def family_of(model_type: Any) -> Family:
    """The row of a `model_type`.

    Raises:
        UnsupportedModelError: there is none; the message names all.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model family {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
