"""Every kind of index over vectors in clusters, as texts are: recall, filters, files."""

from __future__ import annotations

import numpy as np
import pytest

from kvrag.retrieval import IndexRule, VectorIndex
from kvrag.retrieval.vectors import hnsw, ivfpq, kinds

from .helpers import EMBEDDER, add_vectors, open_catalog

COUNT, WIDTH = 3_000, 16
KINDS = ("flat", "hnsw", "ivfpq")


def clustered(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((200, WIDTH))
    rows = centres[rng.integers(200, size=count)] + 0.5 * rng.standard_normal((count, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


QUESTIONS = clustered(99, 25)


@pytest.fixture(scope="module", autouse=True)
def few_are_enough():
    """To learn lists and codes from, which would take long in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "LEAST_VECTORS", 1_000)
        patch.setattr(ivfpq, "_ROTATION_ROUNDS", 2)
        yield


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """Six documents of 500 chunks each; nobody changes it."""
    with open_catalog(tmp_path_factory.mktemp("kinds")) as opened:
        for number in range(6):
            add_vectors(opened, f"document {number}", clustered(number, COUNT // 6))
        yield opened


@pytest.fixture(scope="module")
def folder(catalog):
    """With a file of each kind, each made once."""
    for kind in KINDS:
        assert open_index(catalog, kind, catalog.path.parent).save()
    return catalog.path.parent


def open_index(catalog, kind, folder):
    path = folder / f"{kind}.faiss"
    return VectorIndex.open(path, catalog, "default", EMBEDDER, WIDTH, IndexRule(kind))


def nearest(catalog, query, k, allowed=None):
    ids = catalog.vector_ids("default", EMBEDDER) if allowed is None else allowed
    rows = np.stack([row for row in catalog.vectors(ids.tolist(), EMBEDDER) if row is not None])
    order = np.argsort(-(rows.astype(np.float64) @ query), kind="stable")[:k]
    return set(ids[order].tolist())


def recall(index, catalog, allowed=None):
    shares = []
    for query in QUESTIONS:
        found = index.search(query, 10, allowed=allowed)
        assert len(found) == (10 if allowed is None else min(10, len(allowed)))
        assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)
        (row,) = catalog.vectors([found[0][0]], EMBEDDER)
        assert found[0][1] == pytest.approx(float(row.astype(np.float64) @ query), abs=1e-12)
        ids = {chunk_id for chunk_id, _ in found}
        assert allowed is None or ids <= set(allowed.tolist())
        shares.append(len(ids & nearest(catalog, query, 10, allowed)) / len(found))
    return float(np.mean(shares))


@pytest.mark.parametrize("kind", KINDS)
def test_recall(catalog, folder, kind):
    index = open_index(catalog, kind, folder)
    assert (index.kind, index.is_saved, len(index)) == (kind, True, COUNT)
    assert recall(index, catalog) >= (1.0 if kind == "flat" else 0.97)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.001, 0.1, 0.9])
def test_recall_of_a_filter(catalog, folder, monkeypatch, kind, share):
    """Also where a filter leaves more than is gone through one by one."""
    monkeypatch.setattr(hnsw, "_EXACT_ROWS", 500)
    monkeypatch.setattr(ivfpq, "_ALL_LISTS_ROWS", 500)
    index = open_index(catalog, kind, folder)
    ids = catalog.vector_ids("default", EMBEDDER)
    allowed = np.random.default_rng(3).choice(ids, int(share * COUNT), replace=False)
    assert recall(index, catalog, allowed) >= (1.0 if kind == "flat" else 0.97)
    none = np.array([10**9, 10**9 + 1])
    assert index.search(QUESTIONS[0], 10, allowed=none) == []
    some = np.array([*ids[:3], 10**9])
    assert {chunk_id for chunk_id, _ in index.search(QUESTIONS[0], 10, allowed=some)} == set(
        ids[:3].tolist()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_and_goes(catalog, folder, tmp_path, kind):
    """In a copy of the home: its index takes over what changed, is written and read again."""
    catalog.write_copy(tmp_path / "catalog.sqlite")
    for path in folder.glob(f"{kind}.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open_catalog(tmp_path) as copy:
        index = open_index(copy, kind, tmp_path)
        assert index.is_saved
        gone = copy.document_chunks("default", "document 1")
        copy.delete_document("default", "document 1")
        add_vectors(copy, "another", clustered(77, 200))
        assert index.refresh()
        assert index.kind == kind
        everything = {i for query in QUESTIONS for i, _ in index.search(query, 200)}
        assert not everything & set(gone)
        bound = 1.0 if kind == "flat" else 0.97
        assert recall(index, copy) >= bound
        assert index.save(now=True)
        again = open_index(copy, kind, tmp_path)
        assert (again.kind, again.is_saved, len(again)) == (kind, True, COUNT - 300)
        assert recall(again, copy) >= bound
        assert [again.search(query, 10) for query in QUESTIONS] == [
            index.search(query, 10) for query in QUESTIONS
        ]
        add_vectors(copy, "one more", clustered(78, 50))
        assert again.refresh()
        assert recall(again, copy) >= bound


def test_a_compressed_index_of_too_few_is_flat(catalog, tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "LEAST_VECTORS", COUNT + 1)
    assert open_index(catalog, "ivfpq", tmp_path).kind == "flat"


def test_lists_that_have_grown_long_are_made_anew(catalog, folder, monkeypatch):
    assert open_index(catalog, "ivfpq", folder).is_saved
    monkeypatch.setattr(ivfpq, "_OUTGROWN", 1.0)
    assert not open_index(catalog, "ivfpq", folder).is_saved


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"choice": "annoy"}, "allowed are auto, flat, hnsw, ivfpq"),
        ({"hnsw_from": 0}, "hnsw_from"),
        ({"hnsw_from": 10, "ivfpq_from": 5}, "at most ivfpq_from"),
    ],
)
def test_rules_that_are_none(rule, said):
    with pytest.raises(ValueError, match=said):
        IndexRule(**rule)
