"""A model folder as a GGUF file, for engines that read nothing else.

Only the weights: the file holds no tokenizer, so it takes token ids. The families are those whose
GGUF files differ from the folder in names and in the order of Q's and K's rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Quantisation

from kvrag.errors import UnsupportedModelError
from kvrag.models.config import ModelConfig
from kvrag.models.folder import read_json
from kvrag.models.gguf.names import Weight, expected_weights
from kvrag.models.weights import Weights

__all__ = ["export_gguf"]

_FAMILIES = ("llama", "qwen2", "qwen3")
_TYPES: Mapping[str, Quantisation] = {
    "float32": Quantisation.F32,
    "bfloat16": Quantisation.BF16,
    "float16": Quantisation.F16,
}


def export_gguf(folder: Path, path: Path, dtype: str) -> None:
    """Write the weights of `folder` to `path`: matrices of `dtype`, vectors float32.

    Raises:
        UnsupportedModelError: a family, window or RoPE scaling that is not written.
        ModelError: the folder cannot be read.
    """
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    _refuse(config)
    rope = config.layers[0].rope
    writer = gguf.GGUFWriter(path, config.family)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if rope is not None:
        writer.add_rope_dimension_count(rope.rotary_dim)
        writer.add_rope_freq_base(rope.theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    weights = Weights(folder)
    for name, weight in expected_weights(config.family, _sizes(config)).items():
        kind = _TYPES[dtype] if len(weight.shape) > 1 else Quantisation.F32
        writer.add_tensor(name, gguf.quantize(_stored(weights, weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _refuse(config: ModelConfig) -> None:
    plain = all(
        layer.window is None and layer.rope is not None and layer.rope.kind == "default"
        for layer in config.layers
    )
    if config.family not in _FAMILIES or not plain:
        raise UnsupportedModelError(
            f"no GGUF is written of this {config.family!r} model; families are "
            f"{', '.join(_FAMILIES)}, with full attention and plain RoPE in all layers"
        )


def _sizes(config: ModelConfig) -> dict[str, int | bool]:
    """The entries of config.json that `expected_weights` reads, defaults filled in."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
    }


def _stored(weights: Weights, weight: Weight) -> np.ndarray:
    """A weight as GGUF has it, float32: rows that turn together lie side by side."""
    values = weights.take(weight.name, *weight.shape).float().numpy()
    if weight.paired_heads:
        halves = values.reshape(weight.paired_heads, 2, -1, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values)
