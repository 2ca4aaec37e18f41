"""GGUF files of tiny models, written as llama.cpp's converter writes them.

Nothing here is shared with the conversion back: names come from the `gguf` package's table, the
permutation of Q and K and the divisors of llama3's RoPE from llama.cpp's definitions.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantisation
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from tests.models.tiny_models import CHATML, SPECIAL

_REGEX = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def tokenizer_for(folder: Path, pre: str) -> Tokenizer:
    """The folder's tokenizer as the model family `pre` would have it in its tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = pre == "llama-bpe"
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if pre in _REGEX:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_REGEX[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's rotation pairs neighbours, Hugging Face's the halves of a head."""
    return (
        array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


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


def write_gguf(
    path: Path,
    hf: torch.nn.Module,
    folder: Path,
    *,
    arch: str | None = None,
    pre: str | None = "smollm",
    quantisation: Quantisation = Quantisation.F32,
    drop: tuple[str, ...] = (),
    extra: dict[str, int | float | str] | None = None,
    more_tensors: dict[str, np.ndarray] | None = None,
    token_types: dict[int, int] | None = None,
) -> None:
    """Write the transformers model `hf` with the tokenizer of `folder`.

    drop: metadata keys left out; extra: metadata added or changed; token_types: of some ids.
    """
    config = hf.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, arch or family)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [3 if token in SPECIAL else 1 for token in tokens]
    for index, kind in (token_types or {}).items():
        types[index] = kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    rope = config.rope_parameters
    name = arch or family
    metadata = {
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": head_dim,
        f"{name}.attention.value_length": head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{name}.rope.dimension_count": head_dim,
        f"{name}.rope.freq_base": float(rope["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHATML,
    } | (extra or {})
    for key, value in metadata.items():
        if key in drop or value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)

    names = gguf.get_tensor_name_map(_ARCHS[family], config.num_hidden_layers)
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_divisors(rope, head_dim))
    state = hf.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for theirs, tensor in state.items():
        array = tensor.float().numpy()
        if family == "llama" and ".q_proj." in theirs:
            array = permuted(array, config.num_attention_heads)
        if family == "llama" and ".k_proj." in theirs:
            array = permuted(array, config.num_key_value_heads)
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        kind = Quantisation.F32 if array.ndim == 1 else quantisation
        data = np.ascontiguousarray(array, dtype=np.float32)
        writer.add_tensor(ours, gguf.quantize(data, kind), raw_dtype=kind)
    for ours, array in (more_tensors or {}).items():
        writer.add_tensor(ours, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def rounded(hf: torch.nn.Module, quantisation: Quantisation) -> torch.nn.Module:
    """The model with its matrices as the quantisation leaves them."""
    for parameter in hf.parameters():
        if parameter.ndim == 2:
            data = gguf.quantize(parameter.float().numpy(), quantisation)
            parameter.copy_(torch.from_numpy(gguf.dequantize(data, quantisation)))
    return hf
