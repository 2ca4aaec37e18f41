"""GGUF to a Hugging Face folder, once: float32 weights, config and tokenizer rebuilt.

The `gguf` package reads and dequantises; what llama.cpp's converter changed is changed back here
(it permutes Q and K of the Llama family, and writes tokenizers as lists). The folder appears whole
or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

from kvrag.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from kvrag.models.config import FAMILIES, RopeConfig
from kvrag.models.gguf_tokenizer import gguf_tokenizer, tokenizer_field, tokenizer_options
from kvrag.models.rope import inverse_frequencies

__all__ = ["convert_gguf"]

#: Part of the folder's name: raise it when the conversion changes.
_CONVERTER_VERSION = 1


def convert_gguf(path: Path, models_dir: Path) -> Path:
    """The folder under `models_dir` that holds `path` converted; made when it is not there.

    Raises:
        ModelNotFoundError: no such file.
        ModelError: no GGUF, or a damaged one.
        UnsupportedModelError: a family, tokenizer or quantisation that is refused by name.
    """
    try:
        with path.open("rb") as file:
            digest = xxhash.xxh3_128()
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as exc:
        raise ModelNotFoundError(f"{path} cannot be read: {exc.strerror}") from exc
    folder = models_dir / f"{path.stem}-v{_CONVERTER_VERSION}-{digest.hexdigest()[:16]}"
    if folder.exists():
        return folder
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _locked(models_dir):
            # Whoever waited finds the work done; whoever was killed left a part behind.
            for leftover in models_dir.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            if not folder.exists():
                _convert(path, folder)
    except OSError as exc:
        raise ModelError(f"{path} cannot be converted into {models_dir}: {exc.strerror}") from exc
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _convert(path: Path, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir()
    try:
        _write(path, partial)
        _sync(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, folder: Path) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as exc:  # the reader raises what numpy and struct raise on damaged files
        raise ModelError(f"{path} is no readable GGUF file: {exc}") from exc
    config = _config(path, fields, {tensor.name: tensor for tensor in reader.tensors})
    tensors = dict(_tensors(path, reader.tensors, config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    gguf_tokenizer(path, fields).save(str(folder / "tokenizer.json"))
    options = tokenizer_options(fields)
    for name, content in (("config.json", config), ("tokenizer_config.json", options)):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    arch = fields.get("general.architecture")
    if arch not in FAMILIES:
        raise UnsupportedModelError(
            f"{path.name}: GGUF architecture {arch!r} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )

    def need(name: str) -> Any:
        try:
            return fields[f"{arch}.{name}"]
        except KeyError as exc:
            raise ModelError(f"{path.name} lacks the key {arch}.{name}") from exc

    scaling = fields.get(f"{arch}.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or fields.get(f"{arch}.rope.scaling.factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"{path.name}: RoPE scaling {scaling!r} is not supported")
    heads, hidden = need("attention.head_count"), need("embedding_length")
    head_dim = fields.get(f"{arch}.attention.key_length", hidden // heads)
    rotated = fields.get(f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UnsupportedModelError(
            f"{path.name}: partial rotary embedding ({rotated} of {head_dim}) is not supported"
        )
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(fields.get(f"{arch}.rope.freq_base", 10000.0)),
    }
    if "rope_freqs.weight" in tensors:
        rope |= _llama3_scaling(path, tensors["rope_freqs.weight"].data, rope["rope_theta"])
    return {
        "model_type": arch,
        "hidden_size": hidden,
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": need("feed_forward_length"),
        "max_position_embeddings": need("context_length"),
        # GGUF keeps float32; give back the decimal that the model's author wrote.
        "rms_norm_eps": float(f"{need('attention.layer_norm_rms_epsilon'):.6g}"),
        "vocab_size": len(tokenizer_field(path, fields, "tokens")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }


def _llama3_scaling(path: Path, stretch: Any, theta: float) -> dict[str, Any]:
    """GGUF writes llama3's scaling as one divisor a frequency; find the parameters it came from.

    Every published model uses the bounds 1 and 4 over 8,192 positions and differs in the factor
    alone, which is the largest divisor. The guess is checked against all divisors.
    """
    divisors = torch.from_numpy(np.array(stretch, dtype=np.float32))
    factor, dim = float(divisors.max()), 2 * len(divisors)
    guess = RopeConfig("llama3", theta, factor, 1.0, 4.0, 8192)
    plain = inverse_frequencies(RopeConfig("default", theta), dim)
    if not torch.allclose(plain / divisors, inverse_frequencies(guess, dim), rtol=1e-4):
        raise UnsupportedModelError(
            f"{path.name}: its rope_freqs are not llama3 scaling with bounds 1 and 4 over 8192 "
            "positions; use the model's Hugging Face folder"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _hf_names(config: dict[str, Any]) -> dict[str, str]:
    """GGUF tensor name to Hugging Face tensor name."""
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"blk.{layer}.{ours}.{kind}"] = f"model.layers.{layer}.{theirs}.{kind}"
    return names


def _tensors(
    path: Path, stored: list[Any], config: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf import dequantize

    names = _hf_names(config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in stored:
        if tensor.name == "rope_freqs.weight":
            continue
        if tensor.name not in names:
            raise UnsupportedModelError(f"{path.name}: unknown tensor {tensor.name!r}")
        try:
            array = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as exc:
            raise UnsupportedModelError(
                f"{path.name}: tensor {tensor.name!r} has the unsupported quantisation "
                f"{tensor.tensor_type.name}"
            ) from exc
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if config["model_type"] == "llama" and part in heads:
            # llama.cpp interleaves the two halves that a rotation pairs; put them back in halves.
            array = (
                array.reshape(heads[part], -1, 2, *array.shape[1:])
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        yield names[tensor.name], torch.from_numpy(np.ascontiguousarray(array))


def _sync(folder: Path) -> None:
    """All files and the folder on the disk before the folder gets its name."""
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
