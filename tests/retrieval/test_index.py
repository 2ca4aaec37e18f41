from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path

import faiss
import numpy as np
import pytest

from kvrag.retrieval import Catalog, ChunkInput, Document, IndexRule, VectorIndex, _vector_changes
from kvrag.retrieval.vectors import file
from kvrag.retrieval.vectors.file import _checksum

from .helpers import (
    DIM,
    EMBEDDER,
    TOKENIZER,
    add,
    add_vectors,
    make_document,
    open_catalog,
    unit_vectors,
)


@pytest.fixture
def catalog(tmp_path):
    with open_catalog(tmp_path) as opened:
        for number in range(5):
            add(opened, number)
        yield opened


def open_index(catalog: Catalog, rule: IndexRule | None = None) -> VectorIndex:
    path = catalog.path.parent / "index.faiss"
    return VectorIndex.open(path, catalog, "default", EMBEDDER, DIM, rule)


def files(catalog: Catalog) -> list[Path]:
    """Versions of the index; one, but after a crash."""
    return list(catalog.path.parent.glob("index.*.faiss"))


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


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_ties_come_in_order_of_ids(catalog, kind):
    same = unit_vectors(7, 1)[0]
    add_vectors(catalog, "same", np.repeat(same[None, :], 100, axis=0))
    index = open_index(catalog, IndexRule(kind))
    ids = catalog.document_chunks("default", "same")
    found = index.search(same, 5)
    assert len({score for _, score in found}) == 1
    if kind == "flat":
        assert [chunk_id for chunk_id, _ in found] == ids[:5]


def test_empty_index(tmp_path):
    with open_catalog(tmp_path) as catalog:
        index = open_index(catalog)
        assert index.search(unit_vectors(1, 1)[0], 3) == []
        assert index.save()
        assert len(open_index(catalog)) == 0


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


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_vectors_that_come_late_are_found(catalog, tmp_path, kind):
    """Of a chunk that is older than others of the index: its id is not the largest."""
    index = open_index(catalog, IndexRule(kind))
    vectors = unit_vectors(8, 3)
    chunks = [ChunkInput("late", f"late {i}", [1]) for i in range(3)]
    into = {"tokenizer": TOKENIZER, "vectors": vectors, "embedder": "another"}
    catalog.add_document("default", Document("late", id="late"), chunks, **into)
    ids = catalog.document_chunks("default", "late")
    add(catalog, 60)
    assert index.refresh()
    assert len(index) == 12
    assert catalog.set_vectors(ids, vectors, EMBEDDER) == 3
    assert index.refresh()
    for chunk_id, vector in zip(ids, vectors, strict=True):
        assert index.search(vector, 1)[0][0] == chunk_id
        assert index.search(vector, 1, allowed=np.array([ids[0]]))[0][0] == ids[0]
    catalog.delete_document("default", "late")
    assert index.refresh()
    assert {i for i, _ in index.search(vectors[0], 100)}.isdisjoint(ids)
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
    (path,) = files(catalog)
    damage(path, path.with_name("index.json"))
    assert "building it" in rebuilt(catalog, caplog)
    assert open_index(catalog).save()
    assert rebuilt(catalog, caplog) == ""


@pytest.mark.parametrize("other", [faiss.IndexFlatL2(DIM), faiss.IndexFlatIP(DIM + 1)])
def test_valid_checksum_over_another_kind_of_index(catalog, caplog, other):
    assert open_index(catalog).save()
    (path,) = files(catalog)
    faiss.write_index(other, str(path))
    side = path.with_name("index.json")
    side.write_text(json.dumps({**json.loads(side.read_text()), "xxh3_64": _checksum(path)}))
    assert "another kind" in rebuilt(catalog, caplog)


@pytest.mark.parametrize("name", ["../index.0.faiss", "/etc/passwd", "", 7, "index.json"])
def test_a_sidecar_that_names_something_else(catalog, caplog, name):
    assert open_index(catalog).save()
    side = catalog.path.with_name("index.json")
    side.write_text(json.dumps({**json.loads(side.read_text()), "file": name}))
    assert "rebuilding" in rebuilt(catalog, caplog)
    assert open_index(catalog).save()
    assert rebuilt(catalog, caplog) == ""


def test_a_file_that_is_behind_is_caught_up_with(catalog, caplog):
    assert open_index(catalog).save()
    (path,) = files(catalog)
    add(catalog, 70, chunks=3)
    catalog.delete_document("default", make_document(2).id)
    assert rebuilt(catalog, caplog) == ""
    assert files(catalog) == [path]  # opening writes nothing
    index = open_index(catalog)
    assert not index.is_saved
    assert index.save(now=True)
    assert files(catalog) != [path]
    assert open_index(catalog).is_saved


def test_files_of_a_lost_future_are_rebuilt(catalog, caplog, tmp_path):
    """A catalog restored from a copy gives the ids of what was lost to other chunks."""
    copy = tmp_path / "copy.sqlite"
    catalog.write_copy(copy)
    add(catalog, 70)
    assert open_index(catalog).save()
    with Catalog.open(copy) as restored:
        assert restored.identity == catalog.identity
        add(restored, 71)
        assert "another state" in rebuilt(restored, caplog)
        add(restored, 72)
        assert "another state" in rebuilt(restored, caplog)
        assert open_index(restored).save()
        assert rebuilt(restored, caplog) == ""


def test_foreign_files_are_rebuilt(catalog, caplog, tmp_path):
    assert open_index(catalog).save()
    (tmp_path / "second").mkdir()
    for path in (*files(catalog), catalog.path.with_name("index.json")):
        shutil.copy(path, tmp_path / "second")
    with open_catalog(tmp_path / "second") as second:
        add(second, 1)
        assert "something else" in rebuilt(second, caplog)


def test_more_changes_than_are_remembered(catalog, caplog, monkeypatch):
    index = open_index(catalog)
    assert index.save()
    monkeypatch.setattr(_vector_changes, "_KEPT", 1)
    for number in range(80, 84):
        add(catalog, number)
    catalog.delete_document("default", make_document(0).id)
    assert index.refresh()
    assert index.search(unit_vectors(3, 1)[0], 100) == brute_force(
        catalog, unit_vectors(3, 1)[0], 100
    )
    assert "another state" in rebuilt(catalog, caplog)


def test_small_changes_are_not_written_at_once(catalog):
    rule = IndexRule(written_share=0.5, written_most=4)
    index = open_index(catalog, rule)
    assert index.save()
    (path,) = files(catalog)
    add(catalog, 70)
    assert index.save()
    assert files(catalog) == [path]
    assert not index.is_saved
    add(catalog, 71)
    assert index.save()
    assert files(catalog) != [path]
    assert index.is_saved
    (path,) = files(catalog)
    add(catalog, 72)
    assert index.save(now=True)
    assert files(catalog) != [path]


def test_what_another_process_has_written_is_not_written_again(catalog, tmp_path):
    index = open_index(catalog)
    assert index.save()
    with open_catalog(tmp_path) as other:
        add(other, 70)
        assert open_index(other).save(now=True)
    (path,) = files(catalog)
    assert index.save(now=True)
    assert files(catalog) == [path]
    assert index.is_saved


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_what_is_deleted_is_in_no_vector_and_goes_when_it_is_a_fifth(catalog, kind):
    rule = IndexRule(kind)
    query = unit_vectors(1, 1)[0]
    gone = unit_vectors(0, 2)  # document 0
    index = open_index(catalog, rule)
    catalog.delete_document("default", make_document(0).id)
    assert index.refresh()
    held = index._structure.vectors(np.arange(10))
    assert len(index._rows) == 10
    assert not (held[:, None] == gone[None]).all(-1).any()
    assert index.save(now=True)
    assert len(open_index(catalog, rule)._rows) == 10
    catalog.delete_document("default", make_document(1).id)
    assert index.save()  # which makes it anew
    assert len(index._rows) == len(index) == 6
    assert index.search(query, 100) == brute_force(catalog, query, 100)
    assert index.is_saved


def test_a_kind_comes_and_goes_with_the_number_of_vectors(catalog):
    rule = IndexRule(hnsw_from=20, ivfpq_from=100)
    index = open_index(catalog, rule)
    assert index.kind == "flat"
    more = add_vectors(catalog, "more", unit_vectors(5, 15))
    query = unit_vectors(1, 1)[0]
    index.refresh()
    assert (index.kind, len(index)) == ("flat", 25)  # no search waits for a graph
    assert index.save()
    assert (index.kind, index.is_saved) == ("hnsw", True)
    assert index.search(query, 100) == brute_force(catalog, query, 100)
    index = open_index(catalog, rule)
    assert (index.kind, index.is_saved) == ("hnsw", True)
    for number in range(3):
        catalog.delete_document("default", make_document(number).id)
    assert index.save()
    assert (index.kind, len(index)) == ("hnsw", 19)  # until it is half of where it began
    catalog.delete_document("default", "more")
    assert index.save()
    assert (index.kind, len(index)) == ("flat", 4)
    assert not set(more) & {chunk_id for chunk_id, _ in index.search(query, 100)}
    assert open_index(catalog, IndexRule("hnsw")).kind == "hnsw"  # who asks for one, gets it


def test_a_version_stays_while_its_successor_is_written(catalog, monkeypatch):
    """What a kill leaves between the two replacements is the version before."""
    assert open_index(catalog).save()
    (before,) = files(catalog)
    add(catalog, 70)
    index = open_index(catalog)
    replace, replaced = file._replace, []

    def killed(temporary, path):
        replaced.append(path)
        if path.suffix == ".json":
            raise OSError("killed")
        replace(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr(file, "_replace", killed)
        assert index.save(now=True) is False
    assert len(replaced) == 2
    assert before in files(catalog)
    again = open_index(catalog)
    assert again._saved is not None
    assert len(again) == 12
    os.utime(replaced[0], (time.time() - 7200,) * 2)
    assert again.save(now=True)
    assert len(files(catalog)) == 1
    assert before not in files(catalog)


def test_a_failed_save_is_a_warning(catalog, caplog, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    index = VectorIndex.open(tmp_path / "file" / "index", catalog, "default", EMBEDDER, DIM)
    assert index.save() is False
    assert "was not saved" in caplog.text
    assert len(index) == 10


def test_files_of_killed_saves_are_removed(catalog, tmp_path):
    old = tmp_path / ".index.0123.faiss.partial"
    young = tmp_path / ".index.4567.faiss.partial"
    earlier = [tmp_path / "index.faiss", tmp_path / "index.faiss.json"]  # of another release
    for path in (old, young, *earlier):
        path.write_bytes(b"partial")
    os.utime(old, (time.time() - 7200,) * 2)
    assert open_index(catalog).save()
    assert not any(path.exists() for path in (old, *earlier))
    assert young.exists()


def test_inputs_that_do_not_fit(catalog, tmp_path):
    index = open_index(catalog)
    with pytest.raises(ValueError, match="shape"):
        index.search(np.zeros(DIM + 1, np.float32), 1)
    with pytest.raises(ValueError, match="finite"):
        index.search(np.full(DIM, np.nan, np.float32), 1)
    with pytest.raises(ValueError, match="k must be"):
        index.search(np.zeros(DIM, np.float32), 0)
    with pytest.raises(ValueError, match="components"):
        VectorIndex.open(tmp_path / "x", catalog, "default", EMBEDDER, DIM + 1)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_threads_may_search_and_change_at_once(catalog, kind):
    index = open_index(catalog, IndexRule(kind))
    failures: list[Exception] = []
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                index.refresh()
                found = index.search(unit_vectors(5, 1)[0], 4)
                assert len(found) == 4
                assert all(chunk_id > 0 for chunk_id, _ in found)
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(100, 130):
            add(catalog, number)
            if number % 2:
                assert catalog.delete_document("default", make_document(number).id)
            if number % 10 == 0:
                assert index.save()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []
    index.refresh()
    assert len(index) == 40


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
@pytest.mark.parametrize("between", [False, True])
def test_a_vector_that_was_mended_reaches_an_index_that_is_open(catalog, kind, between):
    index = open_index(catalog, IndexRule(choice=kind, dead_share=1))
    index.save(now=True)
    (right,) = unit_vectors(99, 1)
    with open_catalog(catalog.path.parent) as other:
        other.drop_vectors([1], EMBEDDER)
        if between:
            assert index.refresh()
            assert 1 not in [chunk_id for chunk_id, _ in index.search(right, 20)]
        other.set_vectors([1], right[None], EMBEDDER)
    assert index.refresh()
    add(catalog, 7)
    index.refresh()
    index.save(now=True)
    for searched in (index, open_index(catalog, IndexRule(choice=kind, dead_share=1))):
        assert searched.search(right, 1)[0] == (1, pytest.approx(1))
        assert searched.search(right, 5, allowed=np.array([1])) == [(1, pytest.approx(1))]
        assert searched.search(right, 20) == brute_force(catalog, right, 20)
