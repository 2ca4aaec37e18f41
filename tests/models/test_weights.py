"""Weights of a folder: which files count, and what each kind of damage is called."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from kvrag.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from kvrag.models.folder import INDEX, missing_files, read_json
from kvrag.models.source import open_model
from kvrag.models.weights import Weights

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
TENSORS = {
    EMBED: torch.arange(80.0).reshape(10, 8),
    DOWN: torch.ones(8, 16),
    NORM: torch.ones(8, dtype=torch.bfloat16),
    "lm_head.weight": torch.zeros(10, 8),
}


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model.safetensors", TENSORS)
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    """Three files and their index."""
    parts = [{EMBED: TENSORS[EMBED]}, {DOWN: TENSORS[DOWN]}, {}]
    parts[2] = {name: TENSORS[name] for name in (NORM, "lm_head.weight")}
    places = {}
    for number, part in enumerate(parts, 1):
        name = f"model-0000{number}-of-00003.safetensors"
        save(tmp_path / name, part)
        places |= dict.fromkeys(part, name)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def save(path, tensors):
    save_file(tensors, path, metadata={"format": "pt"})


def header_of(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


# ---- which files ---------------------------------------------------------------------------------


def test_one_file(folder):
    weights = Weights(folder)
    assert list(weights) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)
    assert weights.num_parameters == 80 + 128 + 8 + 80
    assert weights.nbytes == 4 * (80 + 128 + 80) + 2 * 8


def test_shards_with_and_without_an_index(shards):
    for _ in range(2):
        weights = Weights(shards)
        assert {name: weights[name].tolist() for name in weights} == {
            name: tensor.tolist() for name, tensor in TENSORS.items()
        }
        (shards / INDEX).unlink(missing_ok=True)


@pytest.mark.parametrize("index", [True, False])
def test_files_beside_the_shards_count_for_nothing(shards, index):
    """Mistral publishes all weights twice: once more, under other names, as `consolidated`."""
    before = list(Weights(shards))
    if not index:
        (shards / INDEX).unlink()
    save(shards / "consolidated.safetensors", {"layers.0.attention.wq.weight": torch.ones(2, 2)})
    save(shards / "adapter.safetensors", {EMBED: torch.ones(1)})
    assert list(Weights(shards)) == before


def test_the_single_file_comes_before_the_index(shards):
    save(shards / "model.safetensors", {EMBED: torch.ones(1)})
    assert list(Weights(shards)) == [EMBED]


def test_a_missing_shard_is_named_with_a_tensor(shards):
    lost = shards / "model-00002-of-00003.safetensors"
    lost.unlink()
    with pytest.raises(ModelNotFoundError) as caught:
        Weights(shards)
    for part in (str(shards), lost.name, DOWN, "2 of 3 files"):
        assert part in str(caught.value)
    (shards / INDEX).unlink()
    with pytest.raises(ModelNotFoundError, match=rf"{lost.name} is missing; 2 of 3 files"):
        Weights(shards)


def test_a_link_that_leads_nowhere_is_a_missing_file(folder):
    """As a cache leaves it whose blobs were deleted."""
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to(folder / "blob")
    assert len(Weights(folder)) == 4
    (folder / "blob").unlink()
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors is missing"):
        Weights(folder)


def test_what_the_index_promises_and_the_file_lacks(shards):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = "model-00001-of-00003.safetensors"
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        ModelError, match=r"00001-of-00003.*lacks the tensor 'model\.layers\.7\.mlp.*promises"
    ):
        Weights(shards)


def test_a_tensor_that_the_index_does_not_know_is_not_there(shards):
    """An older shard may hold more; which of two same names would be used is then no question."""
    save(
        shards / "model-00002-of-00003.safetensors",
        {DOWN: TENSORS[DOWN], EMBED: torch.zeros(1)},
    )
    torch.testing.assert_close(Weights(shards)[EMBED], TENSORS[EMBED])


def test_a_tensor_in_two_files_without_an_index(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ModelError, match=r"b\.safetensors repeats the tensor .* of a\.safetensors"):
        Weights(folder)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
    ],
)
def test_an_index_that_is_none(shards, index):
    (shards / INDEX).write_text(index)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        Weights(shards)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "x.pt"])
def test_pickle_alone_is_refused_with_a_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(UnsupportedModelError) as caught:
        Weights(tmp_path)
    for part in (str(tmp_path), name, "runs whatever code", "save_pretrained"):
        assert part in str(caught.value)


def test_a_folder_of_gguf_files(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"give the path .*tiny\.gguf"):
        Weights(tmp_path)


def test_missing_files(shards):
    assert missing_files(shards) == ["config.json", "tokenizer.json"]
    for name in ("config.json", "tokenizer.json"):
        (shards / name).touch()
    assert missing_files(shards) == []
    (shards / "model-00003-of-00003.safetensors").unlink()
    assert missing_files(shards) == ["model-00003-of-00003.safetensors"]
    for path in shards.glob("model*"):
        path.unlink()
    assert missing_files(shards) == ["*.safetensors"]
    (shards / "pytorch_model.bin").touch()
    assert missing_files(shards) == ["*.safetensors"]


# ---- damage --------------------------------------------------------------------------------------


def test_a_file_cut_short_names_the_first_tensor_lost(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header, data = header_of(content)
    ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name in TENSORS}
    in_order = sorted(ends, key=ends.__getitem__)
    for position, name in enumerate(in_order):
        path.write_bytes(content[: len(content) - len(data) + ends[name] - 1])
        with pytest.raises(ModelError) as caught:
            Weights(folder)
        text = str(caught.value)
        assert f"it has {path.stat().st_size} bytes and should have {len(content)}" in text
        assert f"'{name}' is the first tensor that is not whole" in text
        assert position == 0 or in_order[position - 1] not in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "it is empty"),
        (b"\x10\x00\x00", "it has 3 bytes"),
        (b"\x64" + b"\x00" * 7 + b"{}", "header alone needs 108; it was cut short"),
        (b"\xff" * 64, "does not begin with a safetensors header"),
        (b"<!DOCTYPE html><html>", "does not begin with a safetensors header"),
        (with_header(b"{" * 20, b""), "header cannot be read"),
        (with_header(b"[1, 2]", b""), "header cannot be read"),
        (with_header(b"\xff\xfe\xfd", b""), "header cannot be read"),
        (with_header(b"[" * 100_000, b""), "header cannot be read"),
        (with_header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "header cannot be read"),
        (
            with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
            "damaged",
        ),
        (
            with_header({"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
            "damaged",
        ),
        (
            with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
            "damaged",
        ),
        (
            with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(9)),
            "damaged",
        ),
    ],
)
def test_files_that_hold_no_tensors(folder, content, expected):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        Weights(folder)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_a_git_lfs_pointer_is_called_one(shards):
    """What a clone without `git lfs` leaves: text of a hundred bytes in place of every shard."""
    path = shards / "model-00002-of-00003.safetensors"
    path.write_text(POINTER)
    with pytest.raises(ModelError, match=rf"{path} is a Git LFS pointer.*git lfs pull"):
        Weights(shards)


def test_a_file_that_vanishes_while_it_is_opened(folder, monkeypatch):
    """Between the headers and the mapping."""
    from kvrag.models import weights

    read = weights.read_header

    def read_and_delete(path):
        tensors = read(path)
        path.unlink()
        return tensors

    monkeypatch.setattr(weights, "read_header", read_and_delete)
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors is not there any more"):
        Weights(folder)


def test_what_is_mapped_outlives_its_name(folder):
    weights = Weights(folder)
    (folder / "model.safetensors").unlink()
    torch.testing.assert_close(weights.take(EMBED, 10, 8), TENSORS[EMBED])


# ---- taking --------------------------------------------------------------------------------------


def refused(folder, tensors, name, *shape) -> str:
    """What `take` says of a tensor, without the name of the file, which must be part of it."""
    (folder / "model.safetensors").unlink()
    save(folder / "model.safetensors", tensors)
    with pytest.raises(ModelError) as caught:
        Weights(folder).take(name, *shape)
    assert str(folder / "model.safetensors") in str(caught.value)
    return str(caught.value)


def test_a_wrong_shape_and_a_wrong_type(folder):
    text = refused(folder, TENSORS, EMBED, 10, 9)
    assert f"'{EMBED}' has shape (10, 8), but the config needs (10, 9)" in text
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn):
        text = refused(folder, {EMBED: torch.ones(10, 8).to(dtype)}, EMBED, 10, 8)
        assert f"'{EMBED}' is {dtype}" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 6_001, 65 * 129 - 1])
def test_one_bad_number_is_found(folder, value, dtype, place):
    """A model with one NaN answers with nothing but NaN; whatever place vectorised code skips."""
    tensor = torch.randn(65, 129, dtype=torch.float64).to(dtype)
    tensor.view(-1)[place] = value
    text = refused(folder, {EMBED: tensor}, EMBED, 65, 129)
    assert f"'{EMBED}' holds NaN or infinity" in text


def test_the_largest_numbers_are_no_infinity(folder):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        limit = torch.finfo(dtype)
        tensor = torch.tensor([[limit.max, limit.min, limit.max, limit.tiny]], dtype=dtype)
        (folder / "model.safetensors").unlink()
        save(folder / "model.safetensors", {EMBED: tensor})
        assert Weights(folder).take(EMBED, 1, 4).equal(tensor)


def test_a_missing_tensor_names_the_folder_and_the_nearest_name(folder):
    weights = Weights(folder)
    with pytest.raises(ModelError) as caught:
        weights.take("model.embed_token.weight", 10, 8)
    assert f"in {folder} lack the tensor 'model.embed_token.weight'" in str(caught.value)
    assert f"the nearest name there is '{EMBED}'" in str(caught.value)
    with pytest.raises(ModelError) as caught:
        weights.take("model.layers.1.mlp.down_proj.weight", 8, 16)
    assert "nearest" not in str(caught.value)  # another layer's is no other name of it
    weights.take(EMBED, 10, 8)
    with pytest.raises(ModelError) as caught:
        weights.take("model.embed_token.weight", 10, 8)
    assert "nearest" not in str(caught.value)  # nor is one that somebody wanted


def test_tensors_that_nobody_took(folder):
    save(
        folder / "model.safetensors",
        TENSORS
        | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.layers.0.mlp.down_proj.bias": torch.ones(8),
        },
    )
    weights = Weights(folder)
    weights.take(DOWN, 8, 16)
    with pytest.raises(
        ModelError, match=rf"{folder}/model\.safetensors holds.*1 of the weights.*down_proj\.bias\)"
    ):
        weights.check_all_taken()
    weights.take("model.layers.0.mlp.down_proj.bias", 8)
    weights.check_all_taken()


# ---- multimodal folders --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("language", "head", "eyes"),
    [
        ("language_model.model.", "language_model.lm_head.weight", "vision_tower."),
        ("model.language_model.", "lm_head.weight", "model.vision_tower."),
    ],
)
def test_only_the_language_part_is_shown(folder, language, head, eyes):
    plain = dict(TENSORS)
    tensors = {language + name.removeprefix("model."): plain[name] for name in (EMBED, DOWN, NORM)}
    tensors[head] = plain["lm_head.weight"]
    tensors[eyes + "encoder.layers.0.mlp.fc1.weight"] = torch.ones(2, 2)
    tensors["multi_modal_projector.mm_input_projection_weight"] = torch.ones(2, 2)
    before = Weights(folder).nbytes
    (folder / "model.safetensors").unlink()
    save(folder / "model.safetensors", tensors)
    weights = Weights(folder)
    assert list(weights) == sorted(TENSORS)
    assert weights.nbytes == before
    for name, tensor in TENSORS.items():
        assert weights.take(name, *tensor.shape).equal(tensor)
    weights.check_all_taken()
    with pytest.raises(ModelError, match="has shape") as caught:
        weights.take(DOWN, 8, 17)
    assert language in str(caught.value)  # by the name that is in the file


def test_a_layer_of_the_language_part_that_nobody_took_is_found(folder):
    (folder / "model.safetensors").unlink()
    save(
        folder / "model.safetensors",
        {"language_model." + DOWN: torch.ones(8, 16), "vision_tower.x": torch.ones(1)},
    )
    with pytest.raises(ModelError, match=r"language_model\.model\.layers\.0\.mlp\.down_proj"):
        Weights(folder).check_all_taken()


def test_a_multimodal_model_of_transformers(tmp_path):
    """The names that transformers writes, and the same numbers as in its memory."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=31,
        boi_token_index=30,
        eoi_token_index=29,
    )
    model = Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    weights = Weights(tmp_path)
    expected = {
        f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()
    }
    shown = {name: weights[name] for name in weights if name != "lm_head.weight"}
    assert shown.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(shown[name], tensor, rtol=0, atol=0)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_weights_are_mapped_not_loaded(tmp_path):
    """Opening, checking and hashing 128 MiB makes no copy of them: pages of the file alone.

    Anonymous memory is what a copy would be in. Pages that are mapped count as `RssFile`.
    """
    save(tmp_path / "model.safetensors", {EMBED: torch.zeros(1 << 15, 1 << 10)})
    code = """
import sys
from pathlib import Path
import torch, xxhash
from kvrag.models.weights import Weights, tensor_bytes

def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

torch.zeros(1 << 20).aminmax()
xxhash.xxh3_128_digest(b"")
before, mapped = resident("RssAnon"), resident("RssFile")
weights = Weights(Path(sys.argv[1]))
tensor = weights.take("model.embed_tokens.weight", 1 << 15, 1 << 10)
xxhash.xxh3_128_digest(tensor_bytes(tensor))
same = tensor.to(torch.float32)
print(resident("RssAnon") - before, resident("RssFile") - mapped)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    anonymous, mapped = map(int, done.stdout.split())
    assert anonymous < 16 << 20
    assert mapped > 120 << 20


def test_a_tensor_that_torch_cannot_hold(folder):
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    (folder / "model.safetensors").write_bytes(with_header(header, bytes(2)))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        Weights(folder).take("a", 4)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, math.inf]},
        {"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
    ],
)
def test_impossible_places_in_a_header(folder, entry):
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(with_header({"a": entry}, bytes(8)))
    with pytest.raises(ModelError, match=r"damaged.*'a'"):
        Weights(folder)


def test_a_head_that_is_tied_and_differs(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    raw = read_json(folder / "config.json")
    assert not raw["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"tie_word_embeddings.*lm_head\.weight"):
        open_model(str(folder), tmp_path, dtype=torch.float32)
