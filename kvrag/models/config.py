"""What a decoder needs to know of a model: one dataclass, filled from a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.models.config_values import flag, object_of, positive, size, token_id_list
from kvrag.models.families import FULL, SLIDING, Family, Norms, family_of
from kvrag.models.rope_config import RopeConfig, read_rope, rope_parameters

__all__ = ["ACTIVATIONS", "LayerConfig", "ModelConfig", "RopeConfig"]

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer; fusion and kernels ask the layer, never the family.

    rope: None where K and Q carry no position. window: a row sees this many positions up to its
    own; None for all.
    """

    rope: RopeConfig | None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and options of a decoder-only transformer with GQA and a gated MLP.

    attention_scale multiplies the scores, embedding_scale the embeddings, residual_scale what
    attention and MLP add; logits_scaling divides the logits.
    """

    family: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    max_positions: int
    norms: Norms
    norm_eps: float
    norm_offset: float
    qk_norm: Literal["head", "all_heads"] | None
    activation: str
    tied_embeddings: bool
    fused_weights: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logits_scaling: float
    layers: tuple[LayerConfig, ...]
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers of K and V that one token leaves in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer the window; None also where no prompt can reach beyond it."""
        return tuple(
            None if layer.window is None or layer.window >= self.max_positions else layer.window
            for layer in self.layers
        )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, context_length: int | None = None
    ) -> ModelConfig:
        """Read a Hugging Face `config.json`.

        Args:
            context_length: most positions that a prompt and its answer may take together; None
                for what the config says. YaRN reaches further, up to its factor times the context
                of pre-training.

        Raises:
            UnsupportedModelError: family, RoPE variant, activation or option not implemented, or
                a number is missing or impossible; the message names it.
            ModelError: `context_length` is not within what the model has.
        """
        name = config.get("model_type")
        family = family_of(name)
        config = _with_defaults(family, _text_part(config))
        _refuse_options(config)
        hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
        kv_heads = size(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = size(config, "head_dim", hidden // heads)
        if head_dim % 2:
            raise UnsupportedModelError(f"head_dim {head_dim} is odd; RoPE turns pairs")
        attention_bias = flag(config, "attention_bias")
        ropes = rope_parameters(family, config)
        max_positions = _max_positions(config, ropes[FULL], context_length)
        return cls(
            family=str(name),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_size=size(config, "intermediate_size"),
            vocab_size=size(config, "vocab_size"),
            max_positions=max_positions,
            norms=family.norms,
            norm_eps=positive(config, "rms_norm_eps", 1e-6),
            norm_offset=family.norm_offset,
            qk_norm=family.qk_norm,
            activation=_activation(config),
            tied_embeddings=flag(config, "tie_word_embeddings"),
            fused_weights=family.fused_weights,
            qkv_bias=family.attention_bias == "qkv"
            or (family.attention_bias == "config" and attention_bias),
            output_bias=family.attention_bias == "config" and attention_bias,
            mlp_bias=family.mlp_bias and flag(config, "mlp_bias"),
            attention_scale=_attention_scale(family, config, head_dim),
            embedding_scale=_embedding_scale(family, config, hidden),
            residual_scale=_multiplier(family, config, "residual_multiplier"),
            logits_scaling=_multiplier(family, config, "logits_scaling"),
            layers=_layers(family, config, ropes, head_dim, max_positions),
            eos_token_ids=token_id_list(config.get("eos_token_id")),
        )


def _text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """A multimodal config keeps the decoder's entries in `text_config`."""
    text = object_of(config, "text_config")
    if not text:
        return dict(config)
    part = text.get("model_type")
    if part is not None and family_of(part) is not family_of(config.get("model_type")):
        raise UnsupportedModelError(
            f"text_config is of the family {part!r}, but the model of {config['model_type']!r}"
        )
    shared = ("tie_word_embeddings", "eos_token_id", "quantization_config")
    return text | {key: config[key] for key in shared if config.get(key) is not None}


def _with_defaults(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The family's defaults where an entry is missing or null.

    Null means something for the window alone: there is none.
    """
    given = {
        name: value
        for name, value in config.items()
        if value is not None or name == "sliding_window"
    }
    return {**family.defaults, **given}


def _max_positions(
    config: Mapping[str, Any], rope: Mapping[str, Any], context_length: int | None
) -> int:
    most = size(config, "max_position_embeddings")
    if context_length is None:
        return most
    if rope.get("rope_type", rope.get("type")) == "yarn":
        # As published, such configs still name the context of pre-training.
        original = size(rope, "original_max_position_embeddings", most)
        most = max(most, int(original * positive(rope, "factor", 1.0)))
    if not 1 <= context_length <= most:
        raise ModelError(f"context_length is {context_length}; the model has {most} positions")
    return context_length


def _refuse_options(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            "quantised Hugging Face weights are not supported; use the unquantised folder or "
            "a GGUF file"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name) is not None:
            raise UnsupportedModelError(f"{name} ({config[name]!r}) is not supported")
    if flag(config, "use_bidirectional_attention"):
        raise UnsupportedModelError(
            "use_bidirectional_attention is not supported: a token would see its future"
        )


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    return str(name)


def _attention_scale(family: Family, config: Mapping[str, Any], head_dim: int) -> float:
    if family.attention_scale == "attention_multiplier":
        return positive(config, "attention_multiplier", 1.0)
    if family.attention_scale == "query_pre_attn_scalar":
        return float(positive(config, "query_pre_attn_scalar") ** -0.5)
    return float(head_dim**-0.5)


def _embedding_scale(family: Family, config: Mapping[str, Any], hidden: int) -> float:
    if family.embedding_scale == "hidden":
        return math.sqrt(hidden)
    if family.embedding_scale == "config":
        return positive(config, "embedding_multiplier", 1.0)
    return 1.0


def _multiplier(family: Family, config: Mapping[str, Any], name: str) -> float:
    return positive(config, name, 1.0) if family.multipliers else 1.0


def _layers(
    family: Family,
    config: Mapping[str, Any],
    parameters_by_type: Mapping[str, Mapping[str, Any]],
    head_dim: int,
    context_length: int,
) -> tuple[LayerConfig, ...]:
    count = size(config, "num_hidden_layers")
    types = family.layer_types(config, count)
    given = config.get("layer_types")
    if given and not family.reads_layer_types and given != types:
        raise UnsupportedModelError(
            f"layer_types is not supported for {config.get('model_type')!r}, whose layers are all "
            f"{types[0]!r} by its other entries"
        )
    window = size(config, "sliding_window") if SLIDING in types else None
    ropes = {
        kind: read_rope(parameters, config, head_dim=head_dim, context_length=context_length)
        for kind, parameters in parameters_by_type.items()
    }
    turned = min(rope.rotary_dim for rope in ropes.values())
    if turned < head_dim and not family.partial_rope:
        raise UnsupportedModelError(
            f"partial_rotary_factor ({turned} of {head_dim} dimensions) is not supported for "
            f"{config.get('model_type')!r}, whose own code turns whole heads"
        )
    return tuple(
        LayerConfig(rope=ropes[kind] if turns else None, window=window if kind == SLIDING else None)
        for kind, turns in zip(types, family.turning(config, count), strict=True)
    )
