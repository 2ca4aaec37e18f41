"""Both indexes together, over an embedder that counts letters."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

from kvrag.retrieval import ChunkInput, Document, HybridSearch, VectorIndex, Where

from .helpers import TOKENIZER, open_catalog

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = {
    "lamp": ("The lamp of Karsk is kept by Anna.", {"year": 1921, "lang": "en"}),
    "lamps": ("The lamps of Karsk are kept by Anna.", {"year": 1921, "lang": "de"}),
    "mine": ("A lead mine is closed.", {"year": 1950, "lang": "en"}),
    "pmal": ("eht pmal fo ksrak si tpek yb anna", {"year": 1960}),
    "zz": ("zebra xylophone quiz", None),
}


class Letters:
    """Vectors of how often each letter comes: an anagram is a copy."""

    name = fingerprint = "letters"
    dim = len(LETTERS)

    def embed_documents(self, texts):
        counts = [[text.lower().count(c) for c in LETTERS] for text in texts]
        rows = np.array(counts, np.float32).reshape(len(texts), self.dim)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    def embed_query(self, text):
        return self.embed_documents([text])[0]


@contextmanager
def opened_with(folder, texts):
    """A search over chunks of these names."""
    embedder = Letters()
    with open_catalog(folder) as catalog:
        ids = {}
        for name, (text, metadata) in texts.items():
            document = Document(text, metadata=metadata)
            catalog.add_document(
                "n",
                document,
                [ChunkInput("", text, [1])],
                tokenizer=TOKENIZER,
                vectors=embedder.embed_documents([text]),
                embedder=embedder.fingerprint,
            )
            (ids[name],) = catalog.document_chunks("n", document.id)
        index = VectorIndex.open(folder / "x.faiss", catalog, "n", "letters", embedder.dim)
        calls = []

        def dense():
            calls.append(1)
            return embedder, index

        names = {i: name for name, i in ids.items()}
        yield HybridSearch(catalog, "n", dense), names, calls


@pytest.fixture
def opened(tmp_path):
    with opened_with(tmp_path, TEXTS) as opened:
        yield opened


def found(opened, question, k=5, **options):
    search, names, _ = opened
    return [(names[hit.chunk_id], hit) for hit in search.search(question, k, **options)]


QUESTION = "the lamp of Karsk"


def test_each_mode_says_what_it_ranked_by(opened):
    dense = found(opened, QUESTION, mode="dense")
    assert len(dense) == 5
    assert [hit.match.dense_rank for _, hit in dense] == [1, 2, 3, 4, 5]
    assert all(hit.score == hit.match.cosine and hit.match.bm25 is None for _, hit in dense)
    lexical = found(opened, QUESTION, mode="lexical")
    assert [name for name, _ in lexical] == ["lamp", "lamps"]
    assert all(hit.score == hit.match.bm25 and hit.match.cosine is None for _, hit in lexical)
    hybrid = found(opened, QUESTION, mode="hybrid")
    assert len(hybrid) == 5
    scores = [hit.score for _, hit in hybrid]
    assert scores == sorted(scores, reverse=True)
    assert max(scores) <= 1
    by_name = dict(hybrid)
    assert by_name["zz"].match.lexical_rank is None
    assert by_name["lamp"].match.lexical_rank == 1
    cosines = {name: hit.match.cosine for name, hit in dense}
    assert {name: hit.match.cosine for name, hit in hybrid} == pytest.approx(cosines)


def test_words_alone_need_no_embedder(opened):
    found(opened, QUESTION, mode="lexical")
    assert opened[2] == []


def test_a_chunk_outside_the_dense_ranking_has_its_cosine_all_the_same(opened, monkeypatch):
    monkeypatch.setattr("kvrag.retrieval.hybrid._DEPTH", 1)
    hits = dict(found(opened, "quiz of lamp", k=1, mode="hybrid"))
    assert all(hit.match.cosine is not None for hit in hits.values())


@pytest.mark.parametrize("mode", ["hybrid", "dense", "lexical"])
def test_a_filter_comes_before_the_ranking(opened, mode):
    """With k = 1, filtered after it, nothing would be left."""
    where = Where.parse({"lang": "de"})
    assert [n for n, _ in found(opened, QUESTION, k=1, mode=mode, where=where)] == ["lamps"]
    where = Where.parse({"year": {"gte": 1950, "lt": 1960}})
    expected = [] if mode == "lexical" else ["mine"]
    assert [n for n, _ in found(opened, QUESTION, k=1, mode=mode, where=where)] == expected
    assert found(opened, QUESTION, mode=mode, where=Where.parse({"year": 1})) == []


def test_a_kept_filter_is_not_used_when_the_corpus_has_changed(opened):
    search, _, _ = opened
    where = Where.parse({"lang": "de"})
    (_hit,) = search.search(QUESTION, 5, mode="dense", where=where)
    catalog = search._catalog
    catalog.delete_document("n", Document(TEXTS["lamps"][0]).id)
    assert search.search(QUESTION, 5, mode="dense", where=where) == []


def test_a_kept_filter_is_not_used_when_a_document_is_described_anew(opened):
    search, names, _ = opened
    catalog, where = search._catalog, Where.parse({"year": 1922})
    assert search.search("zebra quiz", 5, mode="lexical", where=where) == []
    (zebra,) = (chunk_id for chunk_id, name in names.items() if name == "zz")
    assert catalog.describe_document("n", Document(TEXTS["zz"][0], metadata={"year": 1922}))
    (hit,) = search.search("zebra quiz", 5, mode="lexical", where=where)
    assert hit.chunk_id == zebra


def test_mmr_passes_over_copies(opened):
    plain = [name for name, _ in found(opened, QUESTION, k=2, mode="dense")]
    assert set(plain) <= {"lamp", "lamps", "pmal"}
    varied = found(opened, QUESTION, k=2, mode="dense", mmr=0.3)
    assert varied[0][0] == plain[0]
    assert varied[1][0] in {"mine", "zz"}
    assert varied[1][1].score == varied[1][1].match.cosine
    assert found(opened, "xyzzy", mode="lexical", mmr=0.5) == []


@pytest.mark.parametrize("mode", ["hybrid", "dense", "lexical"])
def test_of_two_that_are_nearly_the_same_the_better_one_stays(tmp_path, mode):
    original = "Anna keeps the lamp of Karsk and lights it every night of the long winter at dusk."
    copy = original.replace("dusk", "nine")
    texts = {"copy": copy, "original": original, "other": "A lamp needs oil in winter."}
    texts = {name: (text, None) for name, text in texts.items()}
    with opened_with(tmp_path, texts) as opened:
        asked = "the lamp in winter"
        plain = [name for name, _ in found(opened, asked, k=3, mode=mode)]
        assert set(plain) == set(texts)
        best = next(name for name in plain if name != "other")
        thinned = found(opened, asked, k=3, mode=mode, distinct=0.7)
        kept = [name for name, _ in thinned]
        assert kept == [name for name in plain if name in (best, "other")]
        # Scores stay, the next one takes the place, and what is less alike than that is left.
        assert len(found(opened, asked, k=2, mode=mode, distinct=0.7)) == 2
        assert [n for n, _ in found(opened, asked, k=3, mode=mode, distinct=0.9)] == plain
        both = found(opened, asked, k=2, mode=mode, distinct=0.7, mmr=0.9)
        assert {name for name, _ in both} == {best, "other"}


@pytest.mark.parametrize("mode", ["hybrid", "dense", "lexical"])
def test_a_reranker_orders_more_than_k(opened, mode):
    """It puts the last of what was found first; a chunk that it knows no more is not found."""
    found_before = [name for name, _ in found(opened, QUESTION, k=20, mode=mode)]
    _, names, _ = opened
    asked = []

    def rerank(question, ids):
        asked.append((question, [names[i] for i in ids]))
        return [None if place == 0 else 0.5 * place for place in range(len(ids))]

    hits = found(opened, QUESTION, k=1, mode=mode, rerank=rerank)
    assert asked == [(QUESTION, found_before)]
    assert [name for name, _ in hits] == [found_before[-1]]
    assert hits[0][1].score == 0.5 * (len(found_before) - 1)
    everything = found(opened, QUESTION, k=20, mode=mode, rerank=rerank)
    assert [name for name, _ in everything] == found_before[:0:-1]
    tied = found(opened, QUESTION, k=20, mode=mode, rerank=lambda _, ids: [1.0] * len(ids))
    assert [name for name, _ in tied] == found_before


def test_mmr_takes_a_rerankers_scores_for_relevance(opened):
    def rerank(_, ids):
        return [float(place) for place in range(len(ids))]

    plain = found(opened, QUESTION, k=3, mode="dense", rerank=rerank)
    varied = found(opened, QUESTION, k=3, mode="dense", rerank=rerank, mmr=0.99)
    assert varied[0][0] == plain[0][0]


def test_nothing_found_is_not_reranked(opened):
    assert found(opened, "xyzzy", mode="lexical", rerank=lambda *_: 1 / 0) == []
