"""GGUF files come back as the model that they were written from."""

from __future__ import annotations

import json
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantisation
from safetensors import safe_open
from safetensors.torch import load_file

from kvrag.generation.kv_cache import KVCache
from kvrag.models.forward import extend
from kvrag.models.gguf.config import hf_config
from kvrag.models.gguf.convert import convert_gguf
from kvrag.models.gguf.file import GGUFFile
from kvrag.models.gguf.metadata import Metadata
from kvrag.models.gguf.tensors import weight_sources
from kvrag.models.safetensors_writer import write_weights
from kvrag.models.source import open_model
from kvrag.models.tokenizer import Tokenizer
from tests.models.gguf.files import K_BLOCKS, LLAMA3, PERMUTED, restored, tiny_gguf
from tests.models.tiny_models import TEXT, reference_model, token_ids

PATTERN = ["sliding_attention"] * 5 + ["full_attention"]
#: Family and RoPE of `tiny_config`, and what differs from it.
CASES = [
    ("llama", "default", {}),
    ("llama", "linear", {"tied": True, "num_key_value_heads": 4}),
    ("llama-bias", "default", {}),
    ("llama", "default", {"rope_parameters": LLAMA3, "max_position_embeddings": 2048}),
    ("llama", "default", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "head_dim": 16}),
    ("mistral", "yarn", {"head_dim": 16}),
    ("qwen2", "default", {}),
    ("qwen2", "yarn-factor", {"rms_norm_eps": 1e-6}),
    ("qwen3", "default", {}),
    ("qwen3", "yarn", {"tied": True, "head_dim": 32}),
    ("smollm3", "default", {"num_hidden_layers": 5}),
    ("smollm3", "yarn", {"attention_bias": True, "mlp_bias": True, "tied": False}),
    ("gemma3", "default", {"query_pre_attn_scalar": 16, "head_dim": 16}),
    ("gemma3", "linear", {"query_pre_attn_scalar": 16, "head_dim": 16, "tied": False}),
    ("phi3", "default", {}),
    ("phi3", "longrope", {}),
    ("phi3", "longrope-short", {"max_position_embeddings": 2048}),
    ("phi3-window", "partial-longrope", {}),
    ("phi3-window", "partial", {}),
    ("olmo2", "default", {}),
    ("olmo2-bias", "linear", {"tied": True}),
    ("granite", "default", {}),
    ("granite-bias", "default", {"rope_parameters": LLAMA3, "max_position_embeddings": 2048}),
]
#: One of each architecture.
FEW = [CASES[i] for i in (0, 5, 6, 8, 10, 12, 15, 19, 21)]


def reopened(folder):
    """What transformers makes of a converted folder."""
    return reference_model(folder, torch.float32)


def logits_of(hf, ids):
    with torch.inference_mode():
        return hf(torch.tensor([ids])).logits[0]


def check_same_weights(folder, hf):
    tensors = load_file(folder / "model.safetensors")
    expected = hf.state_dict()
    if hf.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        original = expected[name]
        if hf.config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            # The file holds 1 + w, rounded.
            original = (original + 1) - 1
        assert torch.equal(tensor, original), name


# ---- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rope", "options"), CASES)
def test_model_comes_back(tiny, tmp_path, family, rope, options):
    """Bit for bit in float32: weights, and the logits that transformers computes from them."""
    path = tmp_path / "tiny.gguf"
    _, hf = tiny_gguf(tiny, path, family, rope, options=options)
    folder = convert_gguf(path, tmp_path / "converted")
    check_same_weights(folder, hf)
    # Beyond every window, and beyond the original context of the scaled RoPEs.
    ids = token_ids(200)
    exact = 1e-5 if hf.config.model_type == "gemma3_text" else 0.0
    torch.testing.assert_close(
        logits_of(reopened(folder), ids), logits_of(hf, ids), atol=exact, rtol=0
    )


@pytest.mark.parametrize(("family", "rope", "options"), CASES)
def test_our_decoder_opens_it(tiny, tmp_path, family, rope, options):
    """The same layers as from the original folder, and nearly the logits of transformers."""
    path = tmp_path / "tiny.gguf"
    original, hf = tiny_gguf(tiny, path, family, rope, options=options)
    model = open_model(str(path), tmp_path / "converted", dtype=torch.float32)
    theirs = open_model(str(original), tmp_path / "converted", dtype=torch.float32)
    for ours, other in zip(model.decoder.config.layers, theirs.decoder.config.layers, strict=True):
        assert ours.window == other.window
        assert (ours.rope is None) == (other.rope is None)
    assert model.eos_token_ids == {2}
    ids = token_ids(200)
    cache = KVCache(model.decoder.config, len(ids), dtype=torch.float32, device=torch.device("cpu"))
    logits = extend(model.decoder, ids, cache, every=True)
    if "longrope" not in rope:  # there transformers chooses by the length of the prompt
        torch.testing.assert_close(logits, logits_of(hf, ids), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("family", "rope", "options"), FEW)
def test_tokenizer_opens_in_transformers_too(tiny, tmp_path, family, rope, options):
    """Whatever class transformers has for a family's tokenizer, ours is taken from the folder."""
    from transformers import AutoTokenizer

    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, family, rope, options=options)
    folder = convert_gguf(path, tmp_path / "converted")
    assert AutoTokenizer.from_pretrained(folder).encode(TEXT) == Tokenizer(folder).encode(TEXT)


def test_mistral_comes_as_llama(tiny, tmp_path):
    tiny_gguf(tiny, tmp_path / "tiny.gguf", "mistral")
    folder = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_matrices(tiny, tmp_path, name):
    path = tmp_path / "tiny.gguf"
    _, hf = tiny_gguf(tiny, path, quantisation=Quantisation[name])
    check_dequantised(path, convert_gguf(path, tmp_path / "converted"), hf)


@pytest.mark.parametrize(("family", "rope", "options"), FEW)
def test_quantised_families(tiny, tmp_path, family, rope, options):
    path = tmp_path / "tiny.gguf"
    _, hf = tiny_gguf(tiny, path, family, rope, options=options, quantisation=Quantisation.Q8_0)
    check_dequantised(path, convert_gguf(path, tmp_path / "converted"), hf)


@pytest.mark.parametrize("kind", list(K_BLOCKS))
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_k_quants(tiny, tmp_path, family, kind):
    path = tmp_path / "tiny.gguf"
    options = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    _, hf = tiny_gguf(tiny, path, family, options=options, quantisation=kind)
    check_dequantised(path, convert_gguf(path, tmp_path / "converted"), hf)


def check_dequantised(path, folder, hf):
    """Every tensor equals what the `gguf` package reads, with the rows put back in place."""
    config = hf.config
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    expected = []
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith("rope_"):
            continue
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        for part, count in heads.items():
            if part in tensor.name and config.model_type in PERMUTED:
                array = restored(array, count)
        if config.model_type == "gemma3_text" and tensor.name.endswith("norm.weight"):
            array = array - np.float32(1)
        expected.append(array)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        # The writer keeps the order of the file.
        names = sorted(file.keys(), key=lambda name: _offset(folder, name))
        assert len(names) == len(expected)
        for name, array in zip(names, expected, strict=True):
            np.testing.assert_array_equal(file.get_tensor(name), array, err_msg=name)
    assert reopened(folder).num_parameters() == hf.num_parameters()


def _offset(folder, name):
    content = (folder / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header[name]["data_offsets"][0]


def test_pieces_do_not_show(tiny, tmp_path, monkeypatch):
    """A tensor is dequantised some rows at a time; one row, and rows that do not come out even."""
    path = tmp_path / "tiny.gguf"
    _, hf = tiny_gguf(tiny, path, quantisation=Quantisation.Q8_0)
    for elements in (1, 100, 32 * 7):
        monkeypatch.setattr("kvrag.models.gguf.tensors._BLOCK_ELEMENTS", elements)
        check_dequantised(path, convert_gguf(path, tmp_path / str(elements)), hf)


def test_tensors_are_streamed(tiny, tmp_path, monkeypatch):
    """No tensor is held whole: the largest here is 8 MB as float32."""
    path = tmp_path / "tiny.gguf"
    options = {"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 1}
    tiny_gguf(tiny, path, options=options, quantisation=Quantisation.Q4_K)
    monkeypatch.setattr("kvrag.models.gguf.tensors._BLOCK_ELEMENTS", 1 << 14)
    file = GGUFFile(path)
    metadata = Metadata(path.name, file.fields)
    config = hf_config(metadata, file.tensors, {})
    sources = weight_sources(file, "llama", config)
    assert max(source.nbytes for source in sources) == 8 << 20
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        write_weights(sources, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_large_models_are_sharded(tiny, tmp_path, monkeypatch):
    """Shards of bounded size with an index, which transformers and we open alike."""
    path = tmp_path / "tiny.gguf"
    _, hf = tiny_gguf(tiny, path, "gemma3", options={"head_dim": 16, "query_pre_attn_scalar": 16})
    bound = 60_000
    monkeypatch.setattr("kvrag.models.safetensors_writer.SHARD_BYTES", bound)
    folder = convert_gguf(path, tmp_path / "converted")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert [p.name for p in shards] == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = []
    for shard in shards:
        tensors = load_file(shard)
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        assert sizes[-1] <= bound or len(tensors) == 1
        for name in tensors:
            assert index["weight_map"][name] == shard.name
    assert index["metadata"]["total_size"] == sum(sizes)
    ids = token_ids(30)
    torch.testing.assert_close(
        logits_of(reopened(folder), ids), logits_of(hf, ids), atol=1e-5, rtol=0
    )
    assert open_model(str(path), tmp_path / "converted", dtype=torch.float32).folder == folder


@pytest.mark.parametrize(
    ("keys", "types"),
    [
        ({}, PATTERN + PATTERN[:2]),
        ({"sliding_window_pattern": 2}, ["sliding_attention", "full_attention"] * 4),
        (
            {"sliding_window_pattern": [True, False, False, True] * 2},
            ["sliding_attention", "full_attention", "full_attention", "sliding_attention"] * 2,
        ),
        ({"sliding_window": 0}, ["full_attention"] * 8),
    ],
)
def test_gemma_windows(tiny, tmp_path, keys, types):
    """Without a pattern every sixth layer is global, without a window all are.

    Older files do not say the base of the windowed layers either.
    """
    path = tmp_path / "tiny.gguf"
    extra = {f"gemma3.attention.{key}": value for key, value in keys.items()}
    drop = ("gemma3.rope.freq_base_swa",)
    tiny_gguf(tiny, path, "gemma3", options={"num_hidden_layers": 8}, extra=extra, drop=drop)
    config = json.loads((convert_gguf(path, tmp_path / "c") / "config.json").read_text())
    assert config["layer_types"] == types
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0


def test_gemma_27b_scales_by_another_size(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    options = {"num_hidden_layers": 62, "head_dim": 12, "query_pre_attn_scalar": 8}
    tiny_gguf(tiny, path, "gemma3", options=options)
    folder = convert_gguf(path, tmp_path / "converted")
    assert json.loads((folder / "config.json").read_text())["query_pre_attn_scalar"] == 8


@pytest.mark.parametrize("attention", [None, 0.5])
def test_granites_missing_scales(tiny, tmp_path, attention):
    """What the converter leaves out is 1, and the attention's is the usual one."""
    path = tmp_path / "tiny.gguf"
    drop = ["granite.embedding_scale", "granite.residual_scale"]
    drop += ["granite.attention.scale"] if attention is None else []
    extra = {} if attention is None else {"granite.attention.scale": attention}
    tiny_gguf(tiny, path, "granite", drop=tuple(drop), extra=extra)
    config = json.loads((convert_gguf(path, tmp_path / "c") / "config.json").read_text())
    assert config["embedding_multiplier"] == config["residual_multiplier"] == 1.0
    assert config["attention_multiplier"] == pytest.approx(attention or 8**-0.5)
    assert config["logits_scaling"] == 2.5


def test_old_key_of_linear_scaling(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, extra={"llama.rope.scale_linear": 4.0})
    config = json.loads((convert_gguf(path, tmp_path / "c") / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert config["rope_parameters"]["factor"] == 4.0


@pytest.mark.parametrize("value", [1.3, None])
def test_attention_factor_of_longrope(tiny, tmp_path, value):
    """Only what does not follow from the lengths is written: GGUF rounds it to float32."""
    path = tmp_path / "tiny.gguf"
    extra = {} if value is None else {"phi3.rope.scaling.attn_factor": value}
    tiny_gguf(tiny, path, "phi3", "longrope", extra=extra)
    config = json.loads((convert_gguf(path, tmp_path / "c") / "config.json").read_text())
    assert config["rope_parameters"].get("attention_factor") == value
