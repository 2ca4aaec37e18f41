"""GGUF files come back as the model they were written from, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Quantisation
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrag.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from kvrag.generation.kv_cache import KVCache
from kvrag.models.forward import extend
from kvrag.models.gguf import convert_gguf
from kvrag.models.source import open_model
from kvrag.models.tokenizer import Tokenizer
from tests.models.gguf_files import rounded, tokenizer_for, write_gguf
from tests.models.tiny_models import SPECIAL, TEXT, reference_model, token_ids

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = [
    ("llama", {}),
    ("llama", {"tied": True, "num_key_value_heads": 4}),
    ("llama", {"attention_bias": True}),
    ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 2048}),
    ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "head_dim": 16}),
    ("qwen2", {}),
    ("qwen2", {"tied": True, "rms_norm_eps": 1e-6}),
    ("qwen3", {}),
    ("qwen3", {"tied": True, "head_dim": 32}),
]


def tiny_gguf(tiny, path, family="llama", *, hf=None, options=None, **changes):
    options = {"intermediate_size": 64} | (options or {})
    folder = tiny(family, **options)
    hf = hf or reference_model(folder, torch.float32)
    write_gguf(path, hf, folder, **changes)
    return folder, hf


def logits_of(model, ids):
    cache = KVCache(model.decoder.config, len(ids), dtype=torch.float32, device=torch.device("cpu"))
    return extend(model.decoder, ids, cache, every=True)


def check_same_logits(path, models_dir, hf):
    model = open_model(str(path), models_dir, dtype=torch.float32)
    ids = token_ids(200)
    with torch.inference_mode():
        expected = hf(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_of(model, ids), expected, atol=2e-4, rtol=0)
    return model


# ---- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "options"), CASES)
def test_weights_and_config_come_back(tiny, tmp_path, family, options):
    """Bit for bit in float32; the logits are then equal to the rounding of two implementations."""
    path = tmp_path / "tiny.gguf"
    folder, hf = tiny_gguf(tiny, path, family, options=options)
    model = check_same_logits(path, tmp_path / "converted", hf)
    original = open_model(str(folder), tmp_path / "converted", dtype=torch.float32)
    assert model.decoder.config.layers == original.decoder.config.layers
    assert model.decoder.config.norm_eps == original.decoder.config.norm_eps
    ids = token_ids(200)
    # No other difference is allowed than none: same weights, same pass.
    torch.testing.assert_close(logits_of(model, ids), logits_of(original, ids), atol=1e-5, rtol=0)
    assert model.eos_token_ids == {2}


@pytest.mark.parametrize(
    "quantisation", [Quantisation.Q8_0, Quantisation.F16, Quantisation.BF16, Quantisation.Q4_1]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_quantised_matrices(tiny, tmp_path, family, quantisation):
    path = tmp_path / "tiny.gguf"
    folder = tiny(family, intermediate_size=64)
    hf = rounded(reference_model(folder, torch.float32), quantisation)
    tiny_gguf(tiny, path, family, hf=hf, quantisation=quantisation)
    check_same_logits(path, tmp_path / "converted", hf)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"mlp_bias": True}), ("llama-bias", {}), ("qwen3", {"attention_bias": True})],
)
def test_biases_are_used_or_refused(tiny, tmp_path, family, options):
    """llama.cpp's converter writes every bias; one left out gives other logits without an error."""
    path = tmp_path / "tiny.gguf"
    _, hf = tiny_gguf(tiny, path, family, options=options)
    try:
        open_model(str(path), tmp_path / "converted", dtype=torch.float32)
    except UnsupportedModelError as exc:
        assert "bias" in str(exc)  # noqa: PT017
        return
    check_same_logits(path, tmp_path / "converted", hf)


def test_folder_opens_in_transformers_too(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "tiny.gguf"
    _, hf = tiny_gguf(tiny, path, "qwen3")
    folder = convert_gguf(path, tmp_path / "converted")
    ids = torch.tensor([token_ids(30)])
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, hf(ids).logits, atol=1e-5, rtol=0)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode(TEXT) == Tokenizer(folder).encode(TEXT)


# ---- tokenizers ----------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=["smollm", "qwen2", "llama-bpe"])
def tokenizers(request, tiny, tmp_path_factory):
    """The tokenizer rebuilt from GGUF, and the family's own."""
    root = tmp_path_factory.mktemp("gguf")
    folder, _ = tiny_gguf(tiny, root / "tiny.gguf", pre=request.param)
    rebuilt = Tokenizer(convert_gguf(root / "tiny.gguf", root / "converted"))
    return rebuilt, tokenizer_for(folder, request.param)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(
        st.one_of(
            st.characters(exclude_categories=["Cs"]),
            st.sampled_from("aA1 2'sS'LLre\r\n\t  .,é́Ångström東京😀①Ⅷ"),
        ),
        max_size=40,
    )
)
@example(text=TEXT)
@example(text="I'LL we'Re 1234567 \uff11\uff12\uff13 x²  y\n\n\n z \r\n end   ")
@example(text=" ".join(SPECIAL))
def test_tokenizer_equals_the_familys_own(tokenizers, text):
    rebuilt, own = tokenizers
    assert rebuilt.encode_template(text) == own.encode(text, add_special_tokens=False).ids
    if not any(special in text for special in SPECIAL):
        ids = own.encode(text, add_special_tokens=False).ids
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == own.decode(ids)


def test_control_tokens_stay_text(tokenizers):
    rebuilt, _ = tokenizers
    for special in SPECIAL:
        assert not set(rebuilt.encode(f"a{special}b")) & {0, 1, 2}
        assert rebuilt.encode_template(special) == [SPECIAL.index(special)]


def test_user_defined_tokens(tiny, tmp_path):
    """Tokens of the kind "user defined" are whole wherever they stand, and are shown as text."""
    path = tmp_path / "tiny.gguf"
    vocab = json.loads((tiny(intermediate_size=64) / "tokenizer.json").read_text())["model"][
        "vocab"
    ]
    token = max((text for text in vocab if text.isascii() and text.isalpha()), key=len)
    tiny_gguf(tiny, path, token_types={vocab[token]: 4})
    made = Tokenizer(convert_gguf(path, tmp_path / "converted"))
    assert len(token) > 2
    assert vocab[token] in made.encode(f"x{token}x")
    assert made.decode([vocab[token]]) == token


def test_chat_template_and_tokens(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    folder, _ = tiny_gguf(tiny, path, extra={"tokenizer.ggml.bos_token_id": 1})
    made = Tokenizer(convert_gguf(path, tmp_path / "converted"))
    messages = [{"role": "user", "content": "Who?"}]
    assert made.render_chat(messages) == Tokenizer(folder).render_chat(messages)
    path = tmp_path / "none.gguf"
    tiny_gguf(tiny, path, drop=("tokenizer.chat_template",))
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer(convert_gguf(path, tmp_path / "converted")).render_chat(messages)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gemma3", "phi3", "qwen2moe", "mamba", "bert"])
def test_architecture_is_refused_by_name(tiny, tmp_path, arch):
    tiny_gguf(tiny, tmp_path / "tiny.gguf", arch=arch)
    with pytest.raises(UnsupportedModelError, match=rf"tiny\.gguf.*'{arch}'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())


@pytest.mark.parametrize(
    ("pre", "kind"),
    [("deepseek-llm", "gpt2"), ("tekken", "gpt2"), ("default", "llama"), ("smollm", "bert")],
)
def test_tokenizer_is_refused_by_name(tiny, tmp_path, pre, kind):
    tiny_gguf(tiny, tmp_path / "tiny.gguf", pre=pre, extra={"tokenizer.ggml.model": kind})
    with pytest.raises(UnsupportedModelError, match=f"'{kind}'.*'{pre}'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
        {"llama.rope.dimension_count": 4},
    ],
)
def test_rope_is_refused(tiny, tmp_path, extra):
    """`rope.dimension_count` below the head's size is partial rotation: other logits, no error."""
    tiny_gguf(tiny, tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(UnsupportedModelError, match=r"RoPE|rotary|dimension_count"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")


@pytest.mark.parametrize(
    "change",
    [{"original_max_position_embeddings": 4096}, {"low_freq_factor": 2.0}],
)
def test_other_llama3_bounds_are_refused(tiny, tmp_path, change):
    options = {"rope_parameters": LLAMA3 | change, "head_dim": 64}
    tiny_gguf(tiny, tmp_path / "tiny.gguf", options=options)
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")


def test_unknown_tensor_is_refused(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path, more_tensors={"blk.0.ffn_gate_inp.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        convert_gguf(path, tmp_path / "converted")


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
    ],
)
def test_missing_key_is_named(tiny, tmp_path, key):
    tiny_gguf(tiny, tmp_path / "tiny.gguf", drop=(key,))
    with pytest.raises(ModelError, match=key.replace(".", r"\.")):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.05, 0.5, 0.99])
def test_truncated_file_is_named(tiny, tmp_path, share):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"tiny\.gguf"):
        convert_gguf(path, tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())


def test_no_gguf_at_all(tmp_path):
    (tmp_path / "text.gguf").write_text("no model\n" * 1000)
    with pytest.raises(ModelError, match=r"text\.gguf"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "converted")
    with pytest.raises(ModelNotFoundError, match=r"gone\.gguf"):
        convert_gguf(tmp_path / "gone.gguf", tmp_path / "converted")


def test_folder_for_converted_models_that_cannot_be_made(tiny, tmp_path):
    """A mistyped `models_dir` stops the program with a sentence, not with a bare OSError."""
    tiny_gguf(tiny, tmp_path / "tiny.gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "file" / "converted")


# ---- whole or not at all -------------------------------------------------------------------------


def test_second_opening_converts_nothing(tiny, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path)
    folder = convert_gguf(path, tmp_path / "converted")
    monkeypatch.setattr(gguf, "GGUFReader", None)
    assert convert_gguf(path, tmp_path / "converted") == folder
    copy = tmp_path / "other" / "tiny.gguf"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    assert convert_gguf(copy, tmp_path / "converted") == folder


def test_changed_file_is_another_model(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path)
    first = convert_gguf(path, tmp_path / "converted")
    tiny_gguf(tiny, path, "qwen2")
    assert convert_gguf(path, tmp_path / "converted") != first


def test_two_at_once_agree(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path)
    barrier, folders = threading.Barrier(4), []

    def convert():
        barrier.wait()
        folders.append(convert_gguf(path, tmp_path / "converted"))

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert list((tmp_path / "converted").iterdir()) == [folders[0]]


KILLED = """
import os, signal, sys
from pathlib import Path
import kvrag.models.gguf as module
module._sync = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
module.convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory):
    """A file and a folder in which a conversion was killed just before it was complete."""
    root = tmp_path_factory.mktemp("killed")
    tiny_gguf(tiny, root / "tiny.gguf")
    command = [sys.executable, "-c", KILLED, str(root / "tiny.gguf"), str(root / "converted")]
    done = subprocess.run(command, check=False, timeout=120, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == -signal.SIGKILL
    return root


def test_killed_conversion_leaves_no_model(killed):
    assert not [p for p in (killed / "converted").iterdir() if not p.name.startswith(".")]
    folder = convert_gguf(killed / "tiny.gguf", killed / "converted")
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_killed_conversions_are_cleared_away(killed):
    """Each kill left a folder of the size of the model behind, for ever."""
    folder = convert_gguf(killed / "tiny.gguf", killed / "converted")
    assert list((killed / "converted").iterdir()) == [folder]


def test_failed_conversion_leaves_nothing(tiny, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    tiny_gguf(tiny, path)

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvrag.models.gguf._sync", fail)
    with pytest.raises((OSError, ModelError)):
        convert_gguf(path, tmp_path / "converted")
    assert not any((tmp_path / "converted").iterdir())
