"""GGUF files of tiny models, written as llama.cpp's converter writes them.

Nothing here is shared with the conversion back: names come from the `gguf` package's table, keys,
the permutation of Q and K and the divisors of RoPE from llama.cpp's definitions.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantisation

from tests.models.tiny_models import CHATML, SPECIAL, reference_model

#: GGUF's names by transformers' `model_type`; llama.cpp has none of its own for Mistral.
ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "granite": gguf.MODEL_ARCH.GRANITE,
}
#: Hidden size and the like are multiples of a block of 32.
SIZES = {"intermediate_size": 64}
#: The bounds that every published model has.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
#: Converted by a class that permutes.
PERMUTED = ("llama", "mistral", "smollm3", "granite")
#: Bytes of a block, and where its scales stand, float16.
K_BLOCKS = {
    Quantisation.Q2_K: (84, slice(80, 84)),
    Quantisation.Q3_K: (110, slice(108, 110)),
    Quantisation.Q4_K: (144, slice(0, 4)),
    Quantisation.Q5_K: (176, slice(0, 4)),
    Quantisation.Q6_K: (210, slice(208, 210)),
}


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp pairs dimension i of a head with i + 1, Hugging Face with i + half."""
    return (
        array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def restored(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permuted`."""
    halves = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def rope_divisors(rope: dict, dim: int) -> np.ndarray:
    """llama3's scaling as the divisor of each frequency."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    divisors = []
    for pair in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (pair / dim)
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def tiny_gguf(tiny, path, family="llama", rope="default", *, options=None, **changes):
    """Write a GGUF file; the folder that it was made from, and the model."""
    folder = tiny(family, rope, **(SIZES | (options or {})))
    hf = reference_model(folder, torch.float32)
    write_gguf(path, hf, folder, **changes)
    return folder, hf


def write_gguf(
    path: Path,
    hf: torch.nn.Module,
    folder: Path,
    *,
    arch: str | None = None,
    quantisation: Quantisation = Quantisation.F32,
    drop: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
    more_tensors: dict[str, np.ndarray] | None = None,
    without_tensors: tuple[str, ...] = (),
    tokenizer: dict[str, Any] | None = None,
) -> None:
    """Write the transformers model `hf`, with the tokenizer of `folder` if no other is given.

    drop: metadata keys left out; extra: metadata added or changed; tokenizer: its keys and values.
    """
    config = hf.config
    name = arch or gguf.MODEL_ARCH_NAMES[ARCHS[config.model_type]]
    tensors: dict[str, np.ndarray] = dict(_scaling_tensors(config)) | _tensors(hf)
    metadata = _shape_keys(config) | _rope_keys(config) | _family_keys(config)
    metadata = {f"{name}.{key}": value for key, value in metadata.items()}
    metadata |= (tokenizer or byte_level_keys(folder)) | (extra or {})
    writer = gguf.GGUFWriter(path, name)
    for key, value in metadata.items():
        if key not in drop and value is not None:
            _add(writer, key, value)
    for ours, array in tensors.items():
        if ours not in without_tensors:
            # Vectors are never quantised.
            kind = Quantisation.F32 if array.ndim == 1 else quantisation
            writer.add_tensor(ours, stored(array, kind), raw_dtype=kind)
    for ours, array in (more_tensors or {}).items():
        writer.add_tensor(ours, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(array: np.ndarray, kind: Quantisation) -> np.ndarray:
    """`array` as `kind`; K-quants, which the package cannot write, are random blocks instead."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    if kind not in K_BLOCKS:
        return gguf.quantize(array, kind)
    nbytes, scales = K_BLOCKS[kind]
    rng = np.random.default_rng(array.size)
    blocks = rng.integers(0, 256, (array.size // 256, nbytes), dtype=np.uint8)
    values = rng.normal(0, 0.01, (len(blocks), (scales.stop - scales.start) // 2))
    blocks[:, scales] = values.astype("<f2").view(np.uint8)
    return blocks.reshape(array.shape[0], -1)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


# ---- metadata ------------------------------------------------------------------------------------


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _shape_keys(config) -> dict[str, Any]:
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if config.model_type not in ("phi3", "granite", "olmo2"):
        head_dim = _head_dim(config)
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return keys


def _global_rope(config) -> dict[str, Any]:
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _rope_keys(config) -> dict[str, Any]:
    rope = _global_rope(config)
    keys: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if config.model_type == "phi3":
        partial = rope.get("partial_rotary_factor", 1.0)
        keys["rope.dimension_count"] = (
            int(partial * config.hidden_size) // config.num_attention_heads
        )
        original = config.original_max_position_embeddings
        keys["rope.scaling.original_context_length"] = original
        if rope["rope_type"] == "longrope":
            scale = config.max_position_embeddings / original
            keys["rope.scaling.attn_factor"] = (
                math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            )
        return keys
    if config.model_type in PERMUTED:
        keys["rope.dimension_count"] = _head_dim(config)
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for ours, theirs in (
            ("yarn_attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if rope.get(theirs) is not None:
                keys[f"rope.scaling.{ours}"] = float(rope[theirs])
    return keys


def _family_keys(config) -> dict[str, Any]:
    if config.model_type == "gemma3_text":
        local = config.rope_parameters["sliding_attention"]["rope_theta"]
        return {
            "attention.sliding_window": config.sliding_window,
            "rope.freq_base_swa": float(local),
        }
    if config.model_type == "phi3":
        return {"attention.sliding_window": config.sliding_window or 0}
    if config.model_type == "granite":
        return {
            "vocab_size": config.vocab_size,
            "attention.scale": float(config.attention_multiplier),
            "embedding_scale": float(config.embedding_multiplier),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.logits_scaling),
        }
    return {"vocab_size": config.vocab_size} if config.model_type in PERMUTED else {}


def byte_level_keys(
    folder: Path, pre: str = "smollm", *, token_types: dict[int, int] | None = None
) -> dict[str, Any]:
    """The tokenizer of `folder`; token_types: of some ids."""
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    types = [3 if token in SPECIAL else 1 for token in tokens]
    for index, kind in (token_types or {}).items():
        types[index] = kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }


# ---- tensors -------------------------------------------------------------------------------------


def _scaling_tensors(config):
    rope = _global_rope(config)
    if rope["rope_type"] == "llama3":
        yield "rope_freqs.weight", rope_divisors(rope, _head_dim(config))
    if rope["rope_type"] == "longrope":
        for kind in ("long", "short"):
            factors = np.array(rope[f"{kind}_factor"], dtype=np.float32)
            yield f"rope_factors_{kind}.weight", factors


def _tensors(hf: torch.nn.Module) -> dict[str, np.ndarray]:
    config = hf.config
    family = config.model_type
    names = gguf.get_tensor_name_map(ARCHS[family], config.num_hidden_layers)
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    tensors = {}
    for theirs, tensor in hf.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        for part, count in heads.items():
            if part in theirs and family in PERMUTED:
                array = permuted(array, count)
        if family == "gemma3_text" and theirs.endswith("norm.weight"):
            array = array + 1
        tensors[names.get_name(theirs, try_suffixes=(".weight", ".bias"))] = array
    return tensors
