from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time

import faiss
import numpy as np
import pytest

from kvrag.retrieval import Catalog, VectorIndex

from .helpers import DIM, EMBEDDER, add, make_document, open_catalog, unit_vectors


@pytest.fixture
def catalog(tmp_path):
    with open_catalog(tmp_path) as opened:
        for number in range(5):
            add(opened, number)
        yield opened


def open_index(catalog: Catalog) -> VectorIndex:
    path = catalog.path.parent / "index.faiss"
    return VectorIndex.open(path, catalog, "default", EMBEDDER, DIM)


def brute_force(catalog, query, k):
    scored = []
    for ids, matrix in catalog.iter_vectors("default", EMBEDDER):
        scores = (matrix.astype(np.float64) * query).sum(axis=1)
        scored += zip(ids.tolist(), scores.tolist(), strict=True)
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:k]


@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_search_is_exact(catalog, k):
    index = open_index(catalog)
    assert len(index) == 10
    query = unit_vectors(99, 1)[0]
    assert index.search(query, k) == brute_force(catalog, query, k)


def test_ties_come_in_order_of_ids_whatever_the_order_of_addition(catalog):
    same = unit_vectors(7, 1)[0]
    ids = list(range(1000, 1100))
    for order in (ids, ids[::-1]):
        index = open_index(catalog)
        index.remove(catalog.vector_ids("default", EMBEDDER))
        for chunk_id in order:
            index.add([chunk_id], same[None, :])
        found = index.search(same, 5)
        assert [chunk_id for chunk_id, _ in found] == ids[:5]
        assert len({score for _, score in found}) == 1


def test_empty_index(tmp_path):
    with open_catalog(tmp_path) as catalog:
        index = open_index(catalog)
        assert index.search(unit_vectors(1, 1)[0], 3) == []
        assert index.save()
        assert len(open_index(catalog)) == 0


def test_add_and_remove(catalog):
    index = open_index(catalog)
    index.add([500, 501, 500], unit_vectors(303, 3))
    assert len(index) == 12
    assert index.search(unit_vectors(303, 3)[0], 1)[0][0] == 500
    index.add([500], unit_vectors(404, 1))  # keeps the first vector
    assert index.search(unit_vectors(303, 3)[0], 1)[0][0] == 500
    assert index.remove([500, 501, 999]) == 2
    assert index.remove([]) == 0
    assert len(index) == 10


def test_refresh_takes_over_what_others_changed(catalog, tmp_path):
    index = open_index(catalog)
    assert index.refresh() is False
    with open_catalog(tmp_path) as other:
        add(other, 50, chunks=3)
        other.delete_document("default", make_document(0).id)
    assert len(index) == 10
    assert index.refresh() is True
    assert index.refresh() is False
    assert sorted(i for i, _ in index.search(unit_vectors(1, 1)[0], 100)) == (
        catalog.vector_ids("default", EMBEDDER).tolist()
    )


def test_own_additions_need_no_second_copy(catalog):
    index = open_index(catalog)
    add(catalog, 60)
    ids = catalog.document_chunks("default", make_document(60).id)
    index.add(ids, unit_vectors(60, 2))
    assert index.refresh() is False
    assert len(index) == 12


def rebuilt(catalog: Catalog, caplog) -> str:
    """Open, require the right content, and return what was logged."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="kvrag.retrieval.index"):
        index = open_index(catalog)
    query = unit_vectors(42, 1)[0]
    assert index.search(query, 100) == brute_force(catalog, query, 100)
    return caplog.text


def test_saved_index_is_loaded(catalog, caplog):
    assert "there is no index" in rebuilt(catalog, caplog)
    index = open_index(catalog)
    assert not index.is_saved
    assert index.save()
    assert index.is_saved
    assert open_index(catalog).is_saved
    assert rebuilt(catalog, caplog) == ""
    assert not list(catalog.path.parent.glob(".*.partial"))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, side: flip(path, 0),
        lambda path, side: flip(path, -1),
        lambda path, side: path.write_bytes(path.read_bytes()[:100]),
        lambda path, side: path.write_bytes(b""),
        lambda path, side: path.unlink(),
        lambda path, side: side.unlink(),
        lambda path, side: side.write_bytes(b"{"),
        lambda path, side: side.write_bytes(b"\xff\xfe"),
        lambda path, side: side.write_text("[]"),
        lambda path, side: side.write_text("[" * 60_000),
    ],
)
def test_damaged_files_are_rebuilt(catalog, caplog, damage):
    assert open_index(catalog).save()
    path = catalog.path.parent / "index.faiss"
    damage(path, path.with_name("index.faiss.json"))
    assert "building it" in rebuilt(catalog, caplog)
    assert open_index(catalog).save()
    assert rebuilt(catalog, caplog) == ""


def test_valid_checksum_over_another_kind_of_index(catalog, caplog):
    from kvrag.retrieval._index_file import _checksum

    assert open_index(catalog).save()
    path = catalog.path.parent / "index.faiss"
    faiss.write_index(faiss.IndexFlatL2(DIM), str(path))
    side = path.with_name("index.faiss.json")
    side.write_text(json.dumps({**json.loads(side.read_text()), "xxh3_64": _checksum(path)}))
    assert "another kind" in rebuilt(catalog, caplog)


def test_stale_and_foreign_files_are_rebuilt(catalog, caplog, tmp_path):
    assert open_index(catalog).save()
    add(catalog, 70)
    assert "another state" in rebuilt(catalog, caplog)
    assert open_index(catalog).save()
    for suffix in ("", ".json"):
        (tmp_path / "second").mkdir(exist_ok=True)
        shutil.copy(tmp_path / f"index.faiss{suffix}", tmp_path / "second")
    with open_catalog(tmp_path / "second") as second:
        add(second, 1)
        assert "another state" in rebuilt(second, caplog)


def test_a_failed_save_is_a_warning(catalog, caplog, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    index = VectorIndex.open(tmp_path / "file" / "index", catalog, "default", EMBEDDER, DIM)
    assert index.save() is False
    assert "was not saved" in caplog.text
    assert len(index) == 10


def test_files_of_killed_saves_are_removed(catalog, tmp_path):
    old = tmp_path / ".index.faiss.0123.partial"
    young = tmp_path / ".index.faiss.4567.partial"
    for path in (old, young):
        path.write_bytes(b"partial")
    os.utime(old, (time.time() - 7200,) * 2)
    assert open_index(catalog).save()
    assert not old.exists()
    assert young.exists()


def test_inputs_that_do_not_fit(catalog, tmp_path):
    index = open_index(catalog)
    with pytest.raises(ValueError, match="shape"):
        index.search(np.zeros(DIM + 1, np.float32), 1)
    with pytest.raises(ValueError, match="finite"):
        index.search(np.full(DIM, np.nan, np.float32), 1)
    with pytest.raises(ValueError, match="k must be"):
        index.search(np.zeros(DIM, np.float32), 0)
    with pytest.raises(ValueError, match="shape"):
        index.add([1, 2], unit_vectors(1, 1))
    with pytest.raises(ValueError, match="negative"):
        index.add([-1], unit_vectors(1, 1))
    with pytest.raises(ValueError, match="components"):
        VectorIndex.open(tmp_path / "x", catalog, "default", EMBEDDER, DIM + 1)


def test_threads_may_search_and_change_at_once(catalog):
    index = open_index(catalog)
    failures: list[Exception] = []
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                found = index.search(unit_vectors(5, 1)[0], 4)
                assert len(found) == 4
                assert all(chunk_id > 0 for chunk_id, _ in found)
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(40):
        index.add([2000 + number], unit_vectors(number, 1))
        if number % 2:
            index.remove([2000 + number])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(index) == 30
