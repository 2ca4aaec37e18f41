"""What is written for llama.cpp is read back by the reader that opens llama.cpp's own files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kvrag.bench.gguf_export import export_gguf
from kvrag.models.folder import read_json
from kvrag.models.gguf.file import GGUFFile
from kvrag.models.gguf.tensors import weight_sources
from tests.tiny import make_tiny_model

VARIANTS = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_theta": 1e6}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight_comes_back(variant, dtype, tmp_path):
    family, overrides = VARIANTS[variant]
    folder = make_tiny_model(tmp_path / "model", family=family, **overrides)
    config = read_json(folder / "config.json")
    export_gguf(folder, tmp_path / "model.gguf", dtype)
    file = GGUFFile(tmp_path / "model.gguf")
    sources = {source.name: source for source in weight_sources(file, family, config)}
    expected = load_file(folder / "model.safetensors")
    assert sources.keys() == expected.keys()
    for name, weight in expected.items():
        if weight.dim() > 1:
            weight = weight.to(getattr(torch, dtype)).float()
        found = np.concatenate([*sources[name].blocks()]).reshape(sources[name].shape)
        np.testing.assert_array_equal(found, weight.numpy(), err_msg=name)


def test_shape_and_rope_come_back(tmp_path):
    overrides = {"rope_theta": 123456.0, "rms_norm_eps": 1e-4, "max_position_embeddings": 512}
    folder = make_tiny_model(tmp_path / "model", **overrides)
    export_gguf(folder, tmp_path / "model.gguf", "float32")
    fields = GGUFFile(tmp_path / "model.gguf").fields
    shown = {name.removeprefix("llama."): value for name, value in fields.items()}
    assert shown["rope.freq_base"] == 123456.0
    assert shown["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-4)
    assert shown["context_length"] == 512
    assert shown["attention.head_count"] == 4
    assert shown["attention.head_count_kv"] == 2
    assert shown["attention.key_length"] == shown["rope.dimension_count"] == 8
    assert shown["vocab_size"] == 384
    assert shown["tokenizer.ggml.model"] == "no_vocab"
