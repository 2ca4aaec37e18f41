"""`bench retrieval`: measures against hand-made values, and what it prints."""

from __future__ import annotations

import json
import math

import pytest

from kvrag.bench.retrieval import RetrievalOptions, load_pool, measures, run
from kvrag.errors import InputError
from tests.tiny import make_tiny_cross_encoder, make_tiny_embedder


def test_measures():
    second = 1 / math.log2(3)
    assert measures([5, 1, 9, 2], frozenset({1, 2})) == pytest.approx(
        {
            "ndcg@10": (second + 1 / math.log2(5)) / (1 + second),
            "recall@10": 1.0,
            "mrr@10": 0.5,
        }
    )
    assert measures([1, 2], frozenset({1, 2}))["ndcg@10"] == 1
    assert set(measures([*range(3, 13), 1], frozenset({1})).values()) == {0}


@pytest.fixture
def folder(tmp_path):
    passages = [
        {"title": "Karsk", "text": "Anna keeps the lamp."},
        {"title": "Orrel", "text": "A green cableway."},
        {"title": "Vessin", "text": "A closed lead mine."},
    ]
    lines = "\n".join(map(json.dumps, passages))
    (tmp_path / "passages.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "bm25_results.csv").write_text(
        "setting,question,gold_titles\n"
        "pooled,Who keeps the lamp of Karsk?,Karsk\n"
        "other,ignored,ignored\n"
        "pooled,What is green in Orrel?,Orrel | Karsk\n"
        "pooled,Is the mine of Vessin closed?,Vessin\n",
        encoding="utf-8",
    )
    return tmp_path


def test_what_it_prints(folder, capsys):
    embedder = str(make_tiny_embedder(folder / "embedder"))
    options = RetrievalOptions("even", chunks=7, timed=2, keep=folder / "kept")
    result = run(folder, embedder, options)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["means"] == result["means"]
    assert (result["questions"], result["passages"]) == (2, 3)
    assert result["means"]["lexical"]["mrr@10"]["mean"] == 1
    assert set(result["hybrid_minus"]) == {"bm25", "lexical", "dense"}
    assert set(result["latency"]) == {"embedding", "lexical", "dense", "hybrid"}
    assert all(of["p95_ms"] >= of["p50_ms"] > 0 for of in result["latency"].values())
    (kept,) = (folder / "kept").glob("*.npy")
    stamp = kept.stat().st_mtime_ns
    again = run(folder, embedder, options)
    assert again["means"] == result["means"]
    assert kept.stat().st_mtime_ns == stamp


def test_a_cross_encoder_is_measured_beside(folder):
    embedder = str(make_tiny_embedder(folder / "embedder"))
    model = str(make_tiny_cross_encoder(folder / "cross_encoder"))
    result = run(folder, embedder, RetrievalOptions("all", 5, timed=1, cross_encoder=model))
    assert set(result["hybrid_minus"]) == {"bm25", "lexical", "dense", "reranked"}
    assert set(result["latency"]) == {"embedding", "lexical", "dense", "hybrid", "reranked"}


def test_data_of_another_form(folder):
    (folder / "passages.jsonl").write_text('{"title": 1}')
    with pytest.raises(InputError, match="another form"):
        load_pool(folder)
    (folder / "passages.jsonl").unlink()
    with pytest.raises(InputError, match="another form"):
        load_pool(folder)
