"""The packaged Gemma, converted: ids of SentencePiece, and sense from transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvrag.models.gguf.file import GGUFFile
from kvrag.models.packaged import packaged_source
from kvrag.models.source import model_folder
from kvrag.models.tokenizer import Tokenizer
from tests.models.gguf.test_tokenizer import random_texts, real_texts

pytestmark = pytest.mark.models


@pytest.fixture(scope="module")
def folder(models_dir):
    return model_folder("gemma3-270m", models_dir)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """SentencePiece's own processor, from the lists of the file."""
    library = pytest.importorskip("sentencepiece", reason="needs sentencepiece (the dev extra)")
    from sentencepiece import sentencepiece_model_pb2 as format_

    with packaged_source("gemma3-270m").whole(tmp_path_factory.mktemp("joined")) as path:
        fields = GGUFFile(path).fields
    lists = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    model = format_.ModelProto()
    for token, score, kind in zip(*lists, strict=True):
        # GGUF unescapes user-defined spaces, and calls the unknown token a control token.
        text = token.replace(" ", "▁") if kind == 4 else token
        model.pieces.add(piece=text, score=score, type=2 if token == "<unk>" else kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id = 3
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    made = library.SentencePieceProcessor()
    made.LoadFromSerializedProto(model.SerializeToString())
    return made


def test_ids_equal_sentencepieces(folder, processor):
    tokenizer = Tokenizer(folder)
    repository = Path(__file__).resolve().parents[3]
    pages = [p.read_text(encoding="utf-8") for p in sorted(repository.glob("docs/*.md"))]
    assert pages
    programs = [p.read_text(encoding="utf-8") for p in sorted(repository.glob("kvrag/**/*.py"))]
    for text in [*random_texts(4000), *real_texts(), *pages, *programs]:
        ids = tokenizer.encode(text)
        assert ids == processor.encode(text), repr(text[:200])
        assert tokenizer.decode(ids) == text or processor.decode(ids) == tokenizer.decode(ids)


def test_transformers_opens_it_and_it_speaks_sense(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id == 2
    answer = tokenizer.decode(
        model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    )
    assert "France" in answer or "Paris" in answer
    for start, end in [
        ("Paris is the capital of", " France"),
        ("One, two, three, four,", " five"),
        ("The opposite of hot is", " cold"),
    ]:
        with torch.inference_mode():
            logits = model(tokenizer(start, return_tensors="pt").input_ids).logits[0, -1]
        assert tokenizer.decode([int(logits.argmax())]) == end
