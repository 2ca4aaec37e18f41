"""Which tensors a GGUF file of each architecture has, and which weights they become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Weight", "expected_weights"]

#: Architectures whose rows of Q and K are stored as pairs that turn together, not as halves.
_PAIRED = ("llama", "smollm3", "granite")
_Rows = dict[str, tuple[str, ...]]

_ATTENTION: _Rows = {
    "attn_q": ("self_attn.q_proj", "q", "hidden"),
    "attn_k": ("self_attn.k_proj", "kv", "hidden"),
    "attn_v": ("self_attn.v_proj", "kv", "hidden"),
}
_FUSED_ATTENTION: _Rows = {"attn_qkv": ("self_attn.qkv_proj", "qkv", "hidden")}
_OUTPUT: _Rows = {"attn_output": ("self_attn.o_proj", "hidden", "q")}
_GATED: _Rows = {
    "ffn_gate": ("mlp.gate_proj", "mlp", "hidden"),
    "ffn_up": ("mlp.up_proj", "mlp", "hidden"),
}
_FUSED_GATED: _Rows = {"ffn_up": ("mlp.gate_up_proj", "gate_up", "hidden")}
_DOWN: _Rows = {"ffn_down": ("mlp.down_proj", "hidden", "mlp")}
_BEFORE: _Rows = {
    "attn_norm": ("input_layernorm", "hidden"),
    "ffn_norm": ("post_attention_layernorm", "hidden"),
}
_AFTER: _Rows = {
    "post_attention_norm": ("post_attention_layernorm", "hidden"),
    "post_ffw_norm": ("post_feedforward_layernorm", "hidden"),
}
_AROUND: _Rows = _AFTER | {
    "attn_norm": ("input_layernorm", "hidden"),
    "ffn_norm": ("pre_feedforward_layernorm", "hidden"),
}
_HEAD_NORMS: _Rows = {
    "attn_q_norm": ("self_attn.q_norm", "head"),
    "attn_k_norm": ("self_attn.k_norm", "head"),
}
_WIDE_NORMS: _Rows = {
    "attn_q_norm": ("self_attn.q_norm", "q"),
    "attn_k_norm": ("self_attn.k_norm", "kv"),
}
_MATRICES = _ATTENTION | _OUTPUT | _GATED | _DOWN
#: A layer's weights by architecture: GGUF's name, Hugging Face's, and the sizes of its shape.
_LAYER: Mapping[str, _Rows] = {
    "llama": _MATRICES | _BEFORE,
    "qwen2": _MATRICES | _BEFORE,
    "qwen3": _MATRICES | _BEFORE | _HEAD_NORMS,
    "smollm3": _MATRICES | _BEFORE,
    "gemma3": _MATRICES | _AROUND | _HEAD_NORMS,
    "phi3": _FUSED_ATTENTION | _OUTPUT | _FUSED_GATED | _DOWN | _BEFORE,
    "olmo2": _MATRICES | _AFTER | _WIDE_NORMS,
    "granite": _MATRICES | _BEFORE,
}


@dataclass(frozen=True, slots=True)
class Weight:
    """What a GGUF tensor becomes.

    Args:
        name, shape: at Hugging Face.
        paired_heads: how many heads' rows lie in pairs that turn together; 0: rows are in place.
        shift: is added to every element.
    """

    name: str
    shape: tuple[int, ...]
    paired_heads: int = 0
    shift: float = 0.0


def expected_weights(architecture: str, config: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights of a model with the config.json `config`, by the names of a GGUF file."""
    head, hidden, mlp = config["head_dim"], config["hidden_size"], config["intermediate_size"]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    q, kv = heads["attn_q"] * head, heads["attn_k"] * head
    sizes = {
        "hidden": hidden,
        "head": head,
        "q": q,
        "kv": kv,
        "qkv": q + 2 * kv,
        "mlp": mlp,
        "gate_up": 2 * mlp,
        "vocab": config["vocab_size"],
    }
    norm_shift = -1.0 if architecture == "gemma3" else 0.0

    def weight(name: str, *shape: str, heads: int = 0) -> Weight:
        return Weight(
            name,
            tuple(sizes[size] for size in shape),
            heads if architecture in _PAIRED else 0,
            norm_shift if name.endswith("norm.weight") else 0.0,
        )

    found = {
        "token_embd.weight": weight("model.embed_tokens.weight", "vocab", "hidden"),
        "output_norm.weight": weight("model.norm.weight", "hidden"),
    }
    if not config["tie_word_embeddings"]:
        found["output.weight"] = weight("lm_head.weight", "vocab", "hidden")
    biased = _biased(architecture, config)
    for layer in range(config["num_hidden_layers"]):
        for ours, (theirs, *shape) in _LAYER[architecture].items():
            prefix, name = f"blk.{layer}.{ours}", f"model.layers.{layer}.{theirs}"
            paired = heads.get(ours, 0)
            found[f"{prefix}.weight"] = weight(f"{name}.weight", *shape, heads=paired)
            if ours in biased:
                found[f"{prefix}.bias"] = weight(f"{name}.bias", shape[0], heads=paired)
    return found


def _biased(architecture: str, config: Mapping[str, Any]) -> set[str]:
    """Names of the matrices with a bias; Qwen 2 has them at Q, K and V whatever its config says."""
    names: set[str] = set()
    if architecture == "qwen2" or config.get("attention_bias"):
        names |= _ATTENTION.keys()
    if config.get("attention_bias"):
        names |= _OUTPUT.keys()
    if config.get("mlp_bias"):
        names |= _GATED.keys() | _DOWN.keys()
    return names
