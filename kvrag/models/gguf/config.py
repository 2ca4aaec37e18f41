"""From a GGUF file's metadata to the config.json of the same model.

One row a GGUF architecture; what is not in the table is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import TokenType

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.models.gguf.metadata import Metadata
from kvrag.models.gguf.rope import rope_parameters

__all__ = ["ARCHITECTURES", "hf_config"]

#: Control tokens that end a turn. A chat model's file often names the end of the *text* alone.
_TURN_ENDS = ("<end_of_turn>", "<|eot_id|>", "<|im_end|>", "<|end|>")

Extra = Callable[[Metadata, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What a family's config.json has besides the common entries.

    Args:
        model_type, hf_class: the family's names at Hugging Face.
        biases: its config may say `attention_bias`; `mlp_bias` likewise.
        activation: the entry that names the MLP's, and the name.
        partial: it may rotate a part of a head.
        extra: further entries, from the metadata and the common ones.
    """

    model_type: str
    hf_class: str
    biases: bool = True
    mlp_bias: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    partial: bool = False
    extra: Extra = lambda metadata, config: {}


def _smollm3(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    # GGUF does not say it: every fourth layer has no RoPE.
    return {
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])],
    }


def _gemma3(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    window = metadata.optional_size("attention.sliding_window")
    pattern = metadata.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise ModelError(
                f"{metadata.file}: gemma3.attention.sliding_window_pattern has {len(pattern)} "
                f"entries for {layers} layers"
            )
        sliding = [bool(slides) for slides in pattern]
    else:
        every = metadata.size("attention.sliding_window_pattern", 6)
        sliding = [(layer + 1) % every != 0 for layer in range(layers)]
    if window is None:
        sliding = [False] * layers
    # llama.cpp knows the 27B, which scales scores by another size, by its 62 layers.
    heads = config["num_attention_heads"]
    scalar = config["hidden_size"] // heads if layers == 62 else config["head_dim"]
    local = {"rope_type": "default", "rope_theta": metadata.positive("rope.freq_base_swa", 10000.0)}
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": local,
        },
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 0.0) or None,
        "attn_logit_softcapping": None,
    }


def _phi3(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {
        # 0 stands for no window, as in Phi-4.
        "sliding_window": metadata.optional_size("attention.sliding_window"),
        # This family keeps it beside the RoPE parameters.
        "original_max_position_embeddings": metadata.size(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }


def _olmo2(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    metadata.get("attention.sliding_window_pattern")
    if metadata.get("attention.sliding_window"):
        raise UnsupportedModelError(
            f"{metadata.file}: olmo2.attention.sliding_window makes it an OLMo 3, which is not "
            "supported"
        )
    return {}


def _granite(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "embedding_multiplier": metadata.positive("embedding_scale", 1.0),
        "residual_multiplier": metadata.positive("residual_scale", 1.0),
        "attention_multiplier": metadata.positive("attention.scale", config["head_dim"] ** -0.5),
        "logits_scaling": metadata.positive("logit_scale"),
    }


#: By `general.architecture`. Mistral's models come as llama, and without the window that the first
#: of them had: the file does not say it.
ARCHITECTURES: Mapping[str, _Architecture] = {
    "llama": _Architecture("llama", "LlamaForCausalLM", mlp_bias=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", biases=False),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM"),
    "smollm3": _Architecture("smollm3", "SmolLM3ForCausalLM", mlp_bias=True, extra=_smollm3),
    "gemma3": _Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        extra=_gemma3,
    ),
    "phi3": _Architecture("phi3", "Phi3ForCausalLM", biases=False, partial=True, extra=_phi3),
    "olmo2": _Architecture("olmo2", "Olmo2ForCausalLM", extra=_olmo2),
    "granite": _Architecture("granite", "GraniteForCausalLM", mlp_bias=True, extra=_granite),
}


def hf_config(
    metadata: Metadata, tensor_names: Collection[str], rope_tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The config.json of the model.

    Args:
        tensor_names: of the file; they tell which biases there are and whether embeddings are tied.
        rope_tensors: see `rope_parameters`.

    Raises:
        UnsupportedModelError: an architecture, key or RoPE scaling that is refused by name.
        ModelError: a key is missing or impossible.
    """
    if metadata.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{metadata.file}: GGUF architecture {metadata.architecture!r} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[metadata.architecture]
    heads, hidden = metadata.size("attention.head_count"), metadata.size("embedding_length")
    head_dim = metadata.size("attention.key_length", max(1, hidden // heads))
    if metadata.size("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(
            f"{metadata.file}: {metadata.architecture}.attention.value_length differs from "
            f"key_length, {head_dim}"
        )
    layers = metadata.size("block_count")
    if layers > len(tensor_names):
        raise ModelError(
            f"{metadata.file}: {metadata.architecture}.block_count is {layers}, but the file has "
            f"{len(tensor_names)} tensors"
        )
    config = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.size("feed_forward_length"),
        "max_position_embeddings": metadata.size("context_length"),
        "rms_norm_eps": metadata.positive("attention.layer_norm_rms_epsilon"),
        "vocab_size": len(metadata.tokenizer("tokens")),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        architecture.activation[0]: architecture.activation[1],
        "rope_parameters": rope_parameters(
            metadata, rope_tensors, head_dim=head_dim, partial=architecture.partial
        ),
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": _end_tokens(metadata),
        "pad_token_id": metadata.token_id("padding"),
        "torch_dtype": "float32",
    }
    if architecture.biases:
        config["attention_bias"] = "blk.0.attn_q.bias" in tensor_names
    if architecture.mlp_bias:
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensor_names
    config |= architecture.extra(metadata, config)
    metadata.check_all_read()
    return config


def _end_tokens(metadata: Metadata) -> int | list[int] | None:
    """Ends of the text, and of a turn by key or by name, as Hugging Face writes them."""
    tokens = metadata.token_list("tokens", str)
    named = (metadata.token_id(name) for name in ("eos", "eot"))
    ends = [index for index in named if index is not None]
    ends += [
        index
        for index, (token, kind) in enumerate(zip(tokens, metadata.token_types(), strict=True))
        if kind is TokenType.CONTROL and token in _TURN_ENDS
    ]
    ends = list(dict.fromkeys(ends))
    return ends[0] if len(ends) == 1 else ends or None
