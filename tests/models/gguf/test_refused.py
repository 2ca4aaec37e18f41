"""What a GGUF conversion refuses: by file and key or tensor, and nothing is left behind."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantisation

from kvrag.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from kvrag.models.gguf.convert import convert_gguf
from tests.models.gguf.files import LLAMA3, tiny_gguf, write_gguf
from tests.models.tiny_models import reference_model


def refused(path, tmp_path, error, *parts):
    """The conversion fails with a sentence that has all `parts`, and leaves nothing behind."""
    with pytest.raises(error) as caught:
        convert_gguf(path, tmp_path / "converted")
    for part in (path.name, *parts):
        assert part in str(caught.value)
    assert not any((tmp_path / "converted").iterdir())


@pytest.mark.parametrize("arch", ["gemma2", "phi2", "qwen2moe", "mamba", "bert", "llama4"])
def test_architecture_is_refused_by_name(tiny, tmp_path, arch):
    tiny_gguf(tiny, tmp_path / "tiny.gguf", arch=arch)
    refused(tmp_path / "tiny.gguf", tmp_path, UnsupportedModelError, repr(arch), "granite")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "attention.sliding_window", 16),
        ("llama", "expert_count", 8),
        ("llama", "rope.scaling.yarn_log_multiplier", 1.0),
        ("llama", "attention.causal", False),
        ("llama", "attention.value_length", 4),
        ("granite", "rope.scaling.finetuned", False),
        ("qwen3", "pooling_type", 3),
        ("olmo2", "attention.sliding_window", 4096),
        ("gemma3", "attn_logit_softcapping", 50.0),
        ("qwen2", "something.new", "text"),
    ],
)
def test_key_that_changes_the_model_is_refused(tiny, tmp_path, family, key, value):
    """A key that nobody reads is a part of the model that would be left out without an error."""
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, family, extra={f"{family}.{key}": value})
    refused(path, tmp_path, UnsupportedModelError, f"{family}.{key}")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "expert_count", 0),
        ("llama", "attention.causal", True),
        ("llama", "tensor_data_layout", "Meta AI original pth"),
        ("granite", "rope.scaling.finetuned", True),
        ("qwen2", "rope.scaling.type", "none"),
    ],
)
def test_key_that_changes_nothing_is_not(tiny, tmp_path, family, key, value):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, family, extra={f"{family}.{key}": value})
    assert convert_gguf(path, tmp_path / "converted").is_dir()


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        ({"llama.rope.scaling.type": "dynamic"}, "'dynamic'"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_factors_long.weight"),
        ({"llama.rope.dimension_count": 4}, "dimension_count is 4"),
        ({"llama.rope.dimension_count": 64}, "dimension_count is 64"),
        ({"llama.rope.freq_base": float("nan")}, "rope.freq_base is nan"),
        ({"llama.rope.freq_base": 0.0}, "rope.freq_base is 0.0"),
    ],
)
def test_rope_is_refused(tiny, tmp_path, extra, part):
    """`rope.dimension_count` below the head's size is partial rotation: other logits, no error."""
    tiny_gguf(tiny, tmp_path / "tiny.gguf", extra=extra)
    refused(tmp_path / "tiny.gguf", tmp_path, ModelError, part)


@pytest.mark.parametrize(
    "change", [{"original_max_position_embeddings": 4096}, {"low_freq_factor": 2.0}]
)
def test_other_llama3_bounds_are_refused(tiny, tmp_path, change):
    options = {"rope_parameters": LLAMA3 | change, "head_dim": 64}
    tiny_gguf(tiny, tmp_path / "tiny.gguf", options=options)
    refused(tmp_path / "tiny.gguf", tmp_path, UnsupportedModelError, "rope_freqs")


def test_two_scalings_are_refused(tiny, tmp_path):
    options = {"rope_parameters": LLAMA3, "head_dim": 64}
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    tiny_gguf(tiny, tmp_path / "tiny.gguf", options=options, extra=extra)
    refused(tmp_path / "tiny.gguf", tmp_path, UnsupportedModelError, "twice", "rope_freqs")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ([1.0, 2.0], "(2,)"),
        ([1.0, 1.1, float("nan"), 2.0], "rope_factors_long.weight"),
        ([1.0, 1.1, 0.0, 2.0], "rope_factors_long.weight"),
    ],
)
def test_damaged_rope_factors(tiny, tmp_path, values, part):
    path = tmp_path / "tiny.gguf"
    more = {"rope_factors_long.weight": np.array(values, np.float32)}
    drop = tuple(more)
    tiny_gguf(tiny, path, "phi3", "longrope", more_tensors=more, without_tensors=drop)
    refused(path, tmp_path, ModelError, part)


def test_one_part_of_a_split_model_is_refused(tiny, tmp_path):
    tiny_gguf(tiny, tmp_path / "tiny.gguf", extra={"split.count": 3})
    refused(tmp_path / "tiny.gguf", tmp_path, UnsupportedModelError, "one of 3 files")


def test_unknown_tensor_is_refused(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, more_tensors={"blk.0.ffn_gate_inp.weight": np.zeros((4, 4), np.float32)})
    refused(path, tmp_path, UnsupportedModelError, "blk.0.ffn_gate_inp.weight")


@pytest.mark.parametrize(
    ("family", "name"), [("qwen3", "rope_freqs.weight"), ("llama", "rope_factors_long.weight")]
)
def test_scaling_that_the_family_has_not_is_refused(tiny, tmp_path, family, name):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, family, more_tensors={name: np.ones(4, np.float32)})
    refused(path, tmp_path, UnsupportedModelError, name)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_bias_that_the_family_has_not_is_refused(tiny, tmp_path, family):
    """The converter writes every bias; one left out gives other logits without an error."""
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, family, more_tensors={"blk.1.attn_output.bias": np.zeros(32, np.float32)})
    refused(path, tmp_path, UnsupportedModelError, "blk.1.attn_output.bias")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "output_norm.weight"),
        ("qwen2", "blk.3.attn_k.bias"),
        ("qwen3", "blk.0.attn_q_norm.weight"),
        ("gemma3", "blk.6.post_ffw_norm.weight"),
        ("phi3", "blk.2.attn_qkv.weight"),
    ],
)
def test_missing_tensor_is_named(tiny, tmp_path, family, name):
    tiny_gguf(tiny, tmp_path / "tiny.gguf", family, without_tensors=(name,))
    refused(tmp_path / "tiny.gguf", tmp_path, ModelError, name)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("llama.embedding_length", 64, "(400, 32)"),
        ("llama.feed_forward_length", 96, "(64, 32)"),
        ("llama.attention.head_count_kv", 4, "blk.0.attn_k.weight"),
        ("llama.block_count", 5, "blk.4.attn"),
        ("llama.block_count", 3, "blk.3."),
        ("llama.block_count", 10**9, "block_count is 1000000000"),
        ("llama.embedding_length", 0, "embedding_length is 0"),
        ("llama.attention.head_count", [4, 4, 2, 4], "head_count is [4, 4, 2, 4]"),
        ("llama.attention.layer_norm_rms_epsilon", "small", "epsilon is 'small'"),
        ("llama.attention.layer_norm_rms_epsilon", -1e-5, "epsilon is -1e-05"),
        ("tokenizer.ggml.eos_token_id", 400, "eos_token_id is 400"),
    ],
)
def test_contradictions_are_named(tiny, tmp_path, key, value, part):
    tiny_gguf(tiny, tmp_path / "tiny.gguf", extra={key: value})
    refused(tmp_path / "tiny.gguf", tmp_path, ModelError, part)


@pytest.mark.parametrize(
    "key",
    [
        "llama.embedding_length",
        "llama.block_count",
        "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.model",
    ],
)
def test_missing_key_is_named(tiny, tmp_path, key):
    tiny_gguf(tiny, tmp_path / "tiny.gguf", drop=(key,))
    refused(tmp_path / "tiny.gguf", tmp_path, ModelError, key)


@pytest.mark.parametrize("kind", [Quantisation.TQ2_0, Quantisation.IQ4_XS, Quantisation.MXFP4])
def test_quantisation_is_refused_by_name(tiny, tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    folder = tiny("llama", hidden_size=256, intermediate_size=256)
    write_gguf(path, reference_model(folder, torch.float32), folder)
    name = "blk.2.ffn_down.weight"
    _retype(path, name, kind)
    refused(path, tmp_path, UnsupportedModelError, name, kind.name)


def _retype(path, name, kind):
    """Give a stored tensor another quantisation, by its number in the directory."""
    content = bytearray(path.read_bytes())
    at = content.index(name.encode()) + len(name) + 4 + 2 * 8
    assert int.from_bytes(content[at : at + 4], "little") == Quantisation.F32
    content[at : at + 4] = int(kind).to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [Quantisation.F32, Quantisation.Q8_0, Quantisation.Q4_1])
def test_numbers_that_are_none(tiny, tmp_path, kind, value):
    """A scale that is damaged makes 32 weights infinite."""
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, quantisation=kind)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_v.weight")
    content = bytearray(path.read_bytes())
    scale = np.array(value, "<f4" if kind == Quantisation.F32 else "<f2").tobytes()
    content[tensor.data_offset : tensor.data_offset + len(scale)] = scale
    path.write_bytes(content)
    refused(path, tmp_path, ModelError, "blk.1.attn_v.weight", "finite")


def test_no_such_file(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"gone\.gguf"):
        convert_gguf(tmp_path / "gone.gguf", tmp_path / "converted")


def test_folder_for_converted_models_that_cannot_be_made(tiny, tmp_path):
    """A mistyped `models_dir` stops the program with a sentence, not with a bare OSError."""
    tiny_gguf(tiny, tmp_path / "tiny.gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "file" / "converted")


def test_a_token_of_a_whole_page_is_refused_at_once(tiny, tmp_path):
    """All cuts of a piece are looked at: that takes the square of its length."""
    tokens = ["<unk>", "<s>", "</s>", *(chr(0x4E00 + n) for n in range(396)), "a" * 100_000]
    path = tmp_path / "tiny.gguf"
    tiny_gguf(
        tiny,
        path,
        tokenizer={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(n) for n in range(400)],
            "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 397],
        },
    )
    refused(path, tmp_path, UnsupportedModelError, "100000 characters")


def test_a_count_of_parts_that_is_none(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, extra={"split.count": "two"})
    refused(path, tmp_path, UnsupportedModelError, "two")
