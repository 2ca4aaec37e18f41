"""Opening a model: what is missing or damaged is named, and the fingerprint knows what matters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvrag.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from kvrag.generation.kv_cache import KVCache
from kvrag.models.forward import extend
from kvrag.models.source import model_folder, open_model
from kvrag.models.weights import Weights
from tests.models.gguf.files import tiny_gguf
from tests.models.tiny_models import make_tokenizer, token_ids


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of a tiny model that a test may change."""
    return shutil.copytree(tiny("qwen3", "llama3"), tmp_path / "model")


def opened(folder, dtype=torch.float32):
    return open_model(str(folder), folder.parent / "converted", dtype=dtype)


def fingerprint(folder, dtype=torch.float32):
    return opened(folder, dtype).fingerprint


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


# ---- what cannot be opened -----------------------------------------------------------------------


def test_no_such_model(tmp_path):
    for name in ("no-such-model", str(tmp_path / "nowhere")):
        with pytest.raises(ModelNotFoundError, match=f"'{name}'.*smollm2-135m"):
            model_folder(name, tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"gone\.gguf"):
        model_folder(str(tmp_path / "gone.gguf"), tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        open_model(str(tmp_path), tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelNotFoundError) as caught:
        opened(folder)
    assert name.removeprefix("model") in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '"text"', "\x00", '{"model_type": '])
def test_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        opened(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "None"}}'])
def test_tokenizer_that_is_none(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        opened(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.3.self_attn.k_norm.weight",
        "model.layers.0.mlp.down_proj.weight",
    ],
)
def test_missing_and_misshapen_tensors_are_named(folder, name):
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name][1:].clone()}))
    with pytest.raises(ModelError, match=f"'{name}' has shape"):
        opened(folder)
    edit_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"lack the tensor '{name}'"):
        opened(folder)


def test_integer_tensor_is_refused(folder):
    name = "model.norm.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is torch\.int8"):
        opened(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -4096])
def test_truncated_weights_are_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        opened(folder)


def test_bias_that_the_config_does_not_know_is_refused(tiny, tmp_path):
    """Weights that the pass would leave out: the model answers, wrongly, without an error.

    A config without `attention_bias` over weights that have biases is such a model.
    """
    folder = shutil.copytree(tiny("llama-bias"), tmp_path / "model")
    edit_json(folder / "config.json", attention_bias=False)
    with pytest.raises(ModelError, match="bias"):
        opened(folder)


def test_weights_in_several_files(folder):
    """As large models come; the fingerprint is the same however they are cut."""
    before = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002": names[::2], "model-00002-of-00002": names[1::2]}
    for part, part_names in parts.items():
        save_file({n: tensors[n].clone() for n in part_names}, folder / f"{part}.safetensors")
    (folder / "model.safetensors").unlink()
    assert len(Weights(folder)) == len(names)
    assert fingerprint(folder) == before


# ---- the fingerprint -----------------------------------------------------------------------------


def test_fingerprint_is_the_same_at_every_opening(folder, tmp_path):
    made = fingerprint(folder)
    assert len(made) == 64
    assert set(made) <= set("0123456789abcdef")
    assert fingerprint(folder) == made
    assert fingerprint(shutil.copytree(folder, tmp_path / "elsewhere")) == made


def test_fingerprint_knows_one_weight(folder):
    before = fingerprint(folder)

    def nudge(tensors):
        weight = tensors["model.layers.3.mlp.down_proj.weight"]
        weight[5, 7] = torch.nextafter(weight[5, 7], torch.tensor(torch.inf))

    edit_weights(folder, nudge)
    assert fingerprint(folder) != before


def test_fingerprint_knows_swapped_tensors(folder):
    before = fingerprint(folder)
    a, b = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    edit_weights(folder, lambda tensors: tensors.update({a: tensors[b], b: tensors[a].clone()}))
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1001.0},
        {"factor": 16.0},
        {"low_freq_factor": 1.5},
        {"high_freq_factor": 5.0},
        {"original_max_position_embeddings": 128},
        {"rope_type": "default"},
    ],
)
def test_fingerprint_knows_each_rope_parameter(folder, change):
    before = fingerprint(folder)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edit_json(folder / "config.json", rope_parameters=rope | change)
    assert fingerprint(folder) != before


def test_fingerprint_knows_norm_eps_tokenizer_and_dtype(folder):
    made = {fingerprint(folder, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}
    assert len(made) == 3
    before = fingerprint(folder)
    edit_json(folder / "config.json", rms_norm_eps=1e-6)
    changed = fingerprint(folder)
    assert changed != before
    make_tokenizer(folder, vocab_size=390)
    assert fingerprint(folder) != changed


def test_fingerprint_ignores_what_changes_no_kv(folder):
    """A longer context or another stop token must not cost the whole store."""
    before = fingerprint(folder)
    edit_json(folder / "config.json", max_position_embeddings=600, eos_token_id=[1, 2])
    edit_json(folder / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    assert fingerprint(folder) == before


def test_a_scalar_tensor_is_part_of_the_fingerprint(folder):
    """Checkpoints carry scalars (scales, counters); reading one as bytes failed without a type."""
    before = fingerprint(folder)
    edit_weights(folder, lambda tensors: tensors.update({"model.step": torch.tensor(1.0)}))
    assert fingerprint(folder) != before


def test_stop_tokens_of_both_files(folder):
    edit_json(folder / "config.json", eos_token_id=2)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert opened(folder).eos_token_ids == {1, 2}
    (folder / "generation_config.json").unlink()
    assert opened(folder).eos_token_ids == {2}


# ---- multimodal folders --------------------------------------------------------------------------


def test_the_language_part_of_a_multimodal_model_opens(tmp_path):
    """transformers' whole model and ours of its language part say the same of a text."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
        "query_pre_attn_scalar": 16, "max_position_embeddings": 256,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    hf = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=1, eos_token_id=2,
            image_token_index=399, boi_token_index=398, eoi_token_index=397,
        )
    ).eval()  # fmt: skip
    hf.save_pretrained(tmp_path)
    make_tokenizer(tmp_path, vocab_size=390)
    decoder = opened(tmp_path).decoder
    ids = token_ids(40, vocab=390)
    with torch.inference_mode():
        expected = hf(torch.tensor([ids])).logits[0]
        cache = KVCache(
            decoder.config, len(ids), dtype=decoder.compute_dtype, device=decoder.device
        )
        torch.testing.assert_close(
            extend(decoder, ids, cache, every=True), expected, rtol=1e-4, atol=1e-4
        )


# ---- two models in one folder --------------------------------------------------------------------


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(folder):
    """It would make ids that the embedding has no row for, in the middle of some question."""
    make_tokenizer(folder, vocab_size=420)
    with pytest.raises(ModelError) as caught:
        opened(folder)
    for part in (f"{folder / 'tokenizer.json'}", "id 400", "400 rows", "420 tokens"):
        assert part in str(caught.value)
    make_tokenizer(folder, vocab_size=390)  # an embedding larger than its tokenizer is padded
    opened(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", [399, [2, 399], -1])
def test_an_end_that_is_no_token_is_refused(folder, name, eos):
    make_tokenizer(folder, vocab_size=390)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    edit_json(folder / name, eos_token_id=eos)
    with pytest.raises(ModelError) as caught:
        opened(folder)
    wrong = eos if isinstance(eos, int) else eos[-1]
    for part in (str(folder / name), f"id {wrong}", "tokenizer.json", "390 tokens"):
        assert part in str(caught.value)


def test_context_length(folder):
    def positions(context_length):
        model = open_model(str(folder), folder, dtype=torch.float32, context_length=context_length)
        return model.decoder.config.max_positions

    assert positions(None) == 512
    assert positions(100) == 100
    for wrong in (0, 513):
        with pytest.raises(ModelError, match=str(wrong)):
            positions(wrong)


# ---- names of a hub ------------------------------------------------------------------------------


def test_a_path_comes_before_the_hub(folder, monkeypatch):
    """`org/name` is asked for on a hub only when nothing of that name is here."""
    asked = []
    monkeypatch.setattr("kvrag.models.source.hub_folder", lambda wanted: asked.append(wanted))
    monkeypatch.chdir(folder.parent)
    (folder.parent / "org").mkdir()
    folder.rename(folder.parent / "org" / "model")
    assert model_folder("org/model", folder.parent) == Path("org/model")
    (folder.parent / "org" / "notes").write_text("no model")
    for name in ("org/notes", "name", "./org/other", "org/x/y", "smollm-135m"):
        with pytest.raises(ModelNotFoundError, match=name):
            model_folder(name, folder.parent)
    with pytest.raises(ModelNotFoundError, match=r"other\.gguf"):
        model_folder("org/other.gguf", folder.parent)
    assert asked == []
    model_folder("org/other", folder.parent)
    model_folder("org/other@v1", folder.parent)
    assert [str(wanted) for wanted in asked] == ["org/other", "org/other@v1"]


def test_an_unsupported_folder_is_refused_before_its_weights_are_read(folder):
    edit_json(folder / "config.json", model_type="mamba")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="mamba"):
        opened(folder)


def test_a_tokenizer_of_half_the_vocabulary_is_another_models(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    make_tokenizer(folder, vocab_size=400)
    weights = load_file(folder / "model.safetensors")
    wide = {
        name: torch.cat([tensor] * 3) if tensor.shape[0] == 400 else tensor
        for name, tensor in weights.items()
    }
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": 1200}))
    with pytest.raises(ModelError, match=r"tokenizer\.json is another model's.*1200 rows"):
        open_model(str(folder), tmp_path, dtype=torch.float32)


def test_a_damaged_conversion_says_how_it_is_made_anew(tiny, tmp_path):
    path, models_dir = tmp_path / "tiny.gguf", tmp_path / "models"
    tiny_gguf(tiny, path)
    folder = open_model(str(path), models_dir, dtype=torch.float32).folder
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=rf"empty; delete {folder}, and '.*tiny\.gguf'"):
        open_model(str(path), models_dir, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"empty$"):
        open_model(str(folder), models_dir, dtype=torch.float32)
    shutil.rmtree(folder)
    assert open_model(str(path), models_dir, dtype=torch.float32).folder == folder


def test_a_config_that_is_refused_is_named_with_its_file(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "mixtral"}))
    with pytest.raises(UnsupportedModelError, match=r"config\.json: .*'mixtral'"):
        open_model(str(folder), tmp_path, dtype=torch.float32)
