"""Search by words: against a slow BM25, across transactions, processes and schemas."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrag.retrieval import Catalog, ChunkInput, Document, LexicalIndex, _lexical_table
from kvrag.retrieval.lexical import TITLE_WEIGHT
from kvrag.retrieval.terms import terms

from .helpers import EMBEDDER, TOKENIZER, add, make_document, open_catalog, unit_vectors

# Words that Porter's stemmer leaves alone, so that the reference needs none.
WORDS = ["fog", "lamp", "mine", "red", "salt", "tin"]


@pytest.fixture
def catalog(tmp_path):
    with open_catalog(tmp_path) as opened:
        yield opened


def put(catalog, texts, namespace="default", title=""):
    """One document a text; returns the chunk ids."""
    ids = []
    for text in texts:
        document = Document(text, title=title)
        catalog.add_document(
            namespace,
            document,
            [ChunkInput(title, text, [1])],
            tokenizer=TOKENIZER,
            vectors=unit_vectors(1, 1),
            embedder=EMBEDDER,
        )
        ids += catalog.document_chunks(namespace, document.id)
    return ids


def slow_bm25(rows, question):
    """{id: score} of (id, title, text), by the formula of FTS5's documentation."""
    lengths = {i: len(terms(title)) + len(terms(text)) for i, title, text in rows}
    mean = sum(lengths.values()) / len(rows)
    scores = {}
    for term in dict.fromkeys(terms(question)):
        weighted = {
            i: TITLE_WEIGHT * Counter(terms(title))[term] + Counter(terms(text))[term]
            for i, title, text in rows
        }
        matching = [i for i, count in weighted.items() if count]
        idf = math.log((len(rows) - len(matching) + 0.5) / (len(matching) + 0.5))
        for i in matching:
            f = weighted[i]
            part = f * 2.2 / (f + 1.2 * (0.25 + 0.75 * lengths[i] / mean))
            scores[i] = scores.get(i, 0) + max(idf, 1e-6) * part
    return scores


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8, unique=True), texts)
def test_scores_are_those_of_bm25(tmp_path_factory, documents, question):
    with open_catalog(tmp_path_factory.mktemp("c")) as catalog:
        rows = [
            (i, title, text) for title, text in documents for i in put(catalog, [text], title=title)
        ]
        expected = slow_bm25(rows, question)
        found = LexicalIndex(catalog, "default").search(question, 100)
        assert dict(found) == pytest.approx(expected)
        assert found == sorted(found, key=lambda pair: (-pair[1], pair[0]))


def test_words_are_stemmed_and_accents_do_not_matter(catalog):
    (lamps,) = put(catalog, ["Three lámps were burning."])
    put(catalog, ["Nothing to see here."])
    index = LexicalIndex(catalog, "default")
    assert [i for i, _ in index.search("Which LAMP burned?", 5)] == [lamps]
    assert index.search("xyzzy", 5) == []
    assert index.search('"* ()', 5) == []


def test_languages_without_spaces(catalog):
    tokyo, kyoto = put(catalog, ["東京タワーは赤い。", "京都の寺は古い。"])
    index = LexicalIndex(catalog, "default")
    assert next(i for i, _ in index.search("東京はどこ?", 5)) == tokyo
    assert next(i for i, _ in index.search("寺は", 5)) == kyoto


def test_what_a_transaction_of_another_connection_changes_is_seen_at_once(catalog):
    index = LexicalIndex(catalog, "default")
    put(catalog, ["fog over salt"])
    with Catalog.open(catalog.path) as other:
        (lamp,) = put(other, ["a lamp in fog"])
        assert [i for i, _ in index.search("lamp", 5)] == [lamp]
        other.delete_document("default", Document("a lamp in fog").id)
    assert index.search("lamp", 5) == []


def test_namespaces_learn_nothing_of_one_another(catalog):
    """Neither what others hold, nor by how a score weighs how rare a word is."""
    (mine,) = put(catalog, ["a lamp"], "mine")
    put(catalog, ["fog", "salt"], "mine")
    before = LexicalIndex(catalog, "mine").search("lamp", 5)
    assert [i for i, _ in before] == [mine]
    put(catalog, [f"lamp {i}" for i in range(20)], "others")
    assert LexicalIndex(catalog, "mine").search("lamp", 5) == before


def test_only_what_is_allowed_is_ranked(catalog):
    ids = put(catalog, [f"lamp {'fog ' * i}" for i in range(1, 30)])
    index = LexicalIndex(catalog, "default")
    best = [i for i, _ in index.search("lamp", 3)]
    worst = np.array(ids[-2:])
    assert not set(best) & set(worst.tolist())
    assert {i for i, _ in index.search("lamp", 3, allowed=worst)} == set(worst.tolist())


def test_common_words_are_left_out_only_while_rare_ones_find_enough(catalog):
    ids = put(catalog, [f"lamp {i}" for i in range(20)] + ["lamp fog", "salt"])
    index = LexicalIndex(catalog, "default", budget=3)
    assert [i for i, _ in index.search("lamp fog", 1)] == [ids[20]]
    assert len(index.search("lamp fog", 10)) == 10
    assert len(index.search("lamp", 50)) == 21
    assert len(index.search("lamp " + " ".join(f"w{i}" for i in range(5000)), 50)) == 21


def test_what_is_not_indexed_yet_is_caught_up_with(catalog, monkeypatch):
    """As in a catalog of an older release; also when two processes do it at once."""
    for number in range(5):
        add(catalog, number, chunks=3)
    with catalog.writing() as db:
        db.execute("DROP TABLE lexical_1")
        db.execute("DELETE FROM lexical_tables")
    add(catalog, 5, chunks=3)  # does not go in before the others
    catalog.delete_document("default", make_document(2).id)
    monkeypatch.setattr("kvrag.retrieval.lexical._FILL_ROWS", 4)
    with Catalog.open(catalog.path) as other:
        expected = {i for n in (0, 1, 3, 4, 5) for i in ids_of(catalog, n)}
        for opened in (catalog, other):
            found = LexicalIndex(opened, "default").search("part", 100)
            assert {i for i, _ in found} == expected
    add(catalog, 6, chunks=1)
    assert {i for i, _ in LexicalIndex(catalog, "default").search("part of 6", 1)} == set(
        ids_of(catalog, 6)
    )


def test_terms_of_another_version_are_made_again(catalog, monkeypatch):
    put(catalog, ["a lamp"])
    for module in (_lexical_table,):
        monkeypatch.setattr(module, "TERMS_VERSION", 99)
    (fog,) = put(catalog, ["some fog"])
    index = LexicalIndex(catalog, "default")
    assert [i for i, _ in index.search("fog", 5)] == [fog]
    assert len(index.search("lamp fog", 5)) == 2
    with contextlib.closing(sqlite3.connect(catalog.path)) as db:
        assert db.execute("SELECT namespace, version FROM lexical_tables").fetchall() == [
            ("default", 99)
        ]


def ids_of(catalog, number):
    return catalog.document_chunks("default", make_document(number).id)


def test_k_is_checked(catalog):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LexicalIndex(catalog, "default").search("lamp", 0)
    with pytest.raises(ValueError, match="budget"):
        LexicalIndex(catalog, "default", budget=0)


def test_words_of_deleted_chunks_leave_the_file(catalog, tmp_path):
    """FTS5 keeps what is deleted until it merges; a word stands there as the stemmer leaves it."""
    put(catalog, [f"fog lamp mine {number}" for number in range(50)])
    put(catalog, ["zanzibar"])
    files = list(tmp_path.rglob("catalog*"))
    assert any(b"zanzibar" in path.read_bytes() for path in files)
    (chunk_id,) = (found for found, _ in LexicalIndex(catalog, "default").search("zanzibar", 9))
    (chunk,) = catalog.chunk([chunk_id], namespace="default")
    assert catalog.delete_document("default", chunk.document_id) is not None
    assert not any(b"zanzibar" in path.read_bytes() for path in tmp_path.rglob("catalog*"))
    assert len(LexicalIndex(catalog, "default").search("fog", 99)) == 50
