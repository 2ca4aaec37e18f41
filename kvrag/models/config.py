"""What a decoder needs to know of a model: one dataclass, filled from a Hugging Face config.

Families differ by configuration, not by subclass. What is not in the tables below is refused by
name, because a model that is nearly right answers wrongly without an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvrag.errors import UnsupportedModelError

__all__ = ["FAMILIES", "LayerConfig", "ModelConfig", "RopeConfig"]

#: Supported `model_type`s.
FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of one layer, a pure function of the position.

    `factor`, `low_freq_factor`, `high_freq_factor` and `original_max_positions` belong to
    `llama3` and are ignored by `default`.
    """

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer; fusion and kernels ask the layer, never the family."""

    rope: RopeConfig | None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and options of a decoder-only transformer with GQA and a gated SiLU MLP."""

    family: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layers: tuple[LayerConfig, ...]
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers of K and V that one token leaves in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`.

        Raises:
            UnsupportedModelError: family, RoPE variant, activation or option not implemented, or
                a number is missing or impossible; the message names it.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise UnsupportedModelError(
                f"model family {family!r} is not supported; supported are {', '.join(FAMILIES)}"
            )
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedModelError(f"activation {activation!r} is not supported, only 'silu'")
        if config.get("quantization_config"):
            raise UnsupportedModelError(
                "quantised Hugging Face weights are not supported; use the unquantised folder or "
                "a GGUF file"
            )
        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = _size(config, "head_dim", hidden // heads)
        if head_dim % 2:
            raise UnsupportedModelError(f"head_dim {head_dim} is odd; RoPE turns pairs")
        num_layers = _size(config, "num_hidden_layers")
        if config.get("use_sliding_window") or "sliding_attention" in (
            config.get("layer_types") or ()
        ):
            raise UnsupportedModelError(f"sliding-window attention of {family} is not supported")
        attention_bias = bool(config.get("attention_bias", False))
        layer = LayerConfig(rope=_rope(config))
        return cls(
            family=family,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_size=_size(config, "intermediate_size"),
            vocab_size=_size(config, "vocab_size"),
            max_positions=_size(config, "max_position_embeddings"),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=True if family == "qwen2" else attention_bias,
            output_bias=False if family == "qwen2" else attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) if family == "llama" else False,
            qk_norm=family == "qwen3",
            layers=(layer,) * num_layers,
            eos_token_ids=token_id_list(config.get("eos_token_id")),
        )


def token_id_list(value: Any) -> tuple[int, ...]:
    """Hugging Face writes one id, a list of ids or null; make it a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(item) for item in value)


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UnsupportedModelError(
            f"{name} is {value!r} in the model's config; a positive whole number is needed"
        )
    return value


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling`."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError(
            f"RoPE parameters that differ by layer type ({', '.join(rope)}) are not supported"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"RoPE variant {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModelError(f"partial rotary embedding ({partial}) is not supported")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    theta = _positive(rope, "rope_theta")
    if kind == "default":
        return RopeConfig(kind, theta)
    original = rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    scaled = RopeConfig(
        kind,
        theta,
        factor=_positive(rope, "factor"),
        low_freq_factor=_positive(rope, "low_freq_factor"),
        high_freq_factor=_positive(rope, "high_freq_factor"),
        original_max_positions=int(_positive({"original": original}, "original")),
    )
    if scaled.low_freq_factor >= scaled.high_freq_factor:
        raise UnsupportedModelError(
            f"RoPE low_freq_factor {scaled.low_freq_factor} is not below high_freq_factor "
            f"{scaled.high_freq_factor}"
        )
    return scaled


def _positive(rope: Mapping[str, Any], name: str) -> float:
    value = rope.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise UnsupportedModelError(f"RoPE {name} is {value!r}; a positive number is needed")
