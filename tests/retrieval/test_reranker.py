"""The cross-encoder against transformers itself, and a search whose results it orders."""

from __future__ import annotations

import numpy as np
import pytest

from kvrag.retrieval import CrossEncoderReranker, RerankerError
from tests.tiny import make_tiny_cross_encoder

QUESTION = "Who keeps the lamp?"
TEXTS = ["Anna keeps the lamp of Karsk.", "A green cableway.", "word " * 200, "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_cross_encoder(tmp_path_factory.mktemp("cross_encoder"))


def test_scores_are_those_of_transformers(folder):
    """One pair at a time, without padding; the longest is cut to the 64 positions."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for text in TEXTS:
        pair = tokenizer(QUESTION, text, return_tensors="pt", truncation=True, max_length=64)
        with torch.inference_mode():
            expected.append(float(model(**pair).logits.sigmoid()))
    scores = CrossEncoderReranker(folder).scores(QUESTION, TEXTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert len(set(expected)) == len(TEXTS)


def test_no_texts_have_no_scores(folder):
    assert CrossEncoderReranker(folder).scores(QUESTION, []).shape == (0,)


def test_unusable_folders(folder, tmp_path):
    with pytest.raises(RerankerError, match=r"no config\.json"):
        CrossEncoderReranker(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RerankerError, match="cannot be opened"):
        CrossEncoderReranker(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RerankerError, match="only safetensors"):
        CrossEncoderReranker(tmp_path)
    with pytest.raises(RerankerError, match="3 labels"):
        CrossEncoderReranker(make_tiny_cross_encoder(tmp_path / "classes", labels=3))
