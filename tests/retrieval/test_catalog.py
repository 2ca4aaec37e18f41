from __future__ import annotations

import contextlib
import sqlite3
import threading

import numpy as np
import pytest

from kvrag.retrieval import Catalog, CatalogError, ChunkInput, Counts, Document, _sqlite

from .helpers import EMBEDDER, TOKENIZER, add, make_document, open_catalog, unit_vectors


@pytest.fixture
def catalog(tmp_path):
    with open_catalog(tmp_path) as opened:
        yield opened


def test_what_goes_in_comes_out_after_reopening(tmp_path):
    with open_catalog(tmp_path) as catalog:
        document = Document("the text", "T", "a.txt", {"page": [1, "é"]})
        chunk = ChunkInput("T", "the\0text 👩‍👩‍👧‍👦", [5, 2**32 - 1])
        vectors = unit_vectors(1, 1)
        assert catalog.add_document(
            "n", document, [chunk], tokenizer="tok", vectors=vectors, embedder="emb"
        )
        identity = catalog.identity
    with open_catalog(tmp_path) as catalog:
        assert catalog.identity == identity
        assert len(identity) == 32
        stored = catalog.document("n", document.id)
        assert catalog.documents("n") == [stored]
        assert (stored.title, stored.source, stored.num_chunks) == ("T", "a.txt", 1)
        assert stored.metadata == {"page": [1, "é"]}
        (chunk_id,) = catalog.document_chunks("n", document.id)
        (read,) = catalog.chunk([chunk_id])
        assert (read.title, read.text, read.source) == ("T", chunk.text, "a.txt")
        assert (read.document_id, read.ordinal, read.namespace) == (document.id, 0, "n")
        assert catalog.token_ids([chunk_id], "tok") == [[5, 2**32 - 1]]
        ((ids, matrix),) = catalog.iter_vectors("n", "emb")
        assert ids.tolist() == [chunk_id]
        np.testing.assert_array_equal(matrix, vectors)
        assert catalog.counts("n") == catalog.counts() == Counts(1, 1, 1, 0)


def test_adding_twice_changes_nothing(catalog):
    assert add(catalog, 1) is True
    before = catalog.counts(), catalog.generation("default"), catalog.documents("default")
    assert add(catalog, 1) is False
    assert (catalog.counts(), catalog.generation("default"), catalog.documents("default")) == before
    assert add(catalog, 1, namespace="other") is True


def test_batches_line_up_with_their_ids(catalog):
    add(catalog, 1, chunks=700)  # more than one batch
    ids = catalog.document_chunks("default", make_document(1).id)
    asked = [10**9, *ids[::-1], ids[0], -1]
    read = catalog.chunk(asked)
    assert [chunk and chunk.id for chunk in read] == [None, *ids[::-1], ids[0], None]
    tokens = catalog.token_ids(asked, TOKENIZER)
    assert tokens[0] is tokens[-1] is None
    assert tokens[1] == [1, 699, 2**32 - 1]
    assert catalog.token_ids(ids, "another") == [None] * 700
    assert catalog.vectors([10**9, ids[3]], EMBEDDER)[0] is None
    np.testing.assert_array_equal(catalog.vectors(ids, EMBEDDER)[3], unit_vectors(1, 700)[3])
    assert catalog.chunk([]) == []


def test_token_ids_of_a_further_tokenizer(catalog):
    add(catalog, 1)
    first, second = catalog.document_chunks("default", make_document(1).id)
    assert catalog.set_token_ids(first, "new", [1, 2])
    assert catalog.set_token_ids(first, "new", [3])
    assert not catalog.set_token_ids(10**9, "new", [3])
    assert catalog.token_ids([second, first], "new") == [None, [3]]


def test_vectors_of_a_further_embedder(catalog):
    add(catalog, 1)
    ids = list(catalog.chunks_without_vector("default", "new"))
    assert ids == catalog.document_chunks("default", make_document(1).id)
    generation = catalog.generation("default")
    assert catalog.set_vectors([ids[0], 10**9], unit_vectors(5, 2, dim=3), "new") == 1
    assert catalog.generation("default") > generation
    assert list(catalog.chunks_without_vector("default", "new")) == ids[1:]
    assert catalog.set_vectors(ids, unit_vectors(6, 2, dim=3), "new") == 1
    np.testing.assert_array_equal(catalog.vectors(ids, "new")[0], unit_vectors(5, 2, dim=3)[0])
    with pytest.raises(ValueError, match="3 components here, got 4"):
        catalog.set_vectors(ids, unit_vectors(6, 2, dim=4), "new")


def test_block_references_by_scope(catalog):
    add(catalog, 1, chunks=3)
    add(catalog, 1, namespace="other", chunks=1)
    ids = catalog.document_chunks("default", make_document(1).id)
    assert list(catalog.chunks_without_block("default", "m1")) == ids
    assert catalog.add_block_ref("key-1", ids[0], "m1")
    assert catalog.add_block_ref("key-1", ids[0], "m1")
    assert catalog.add_block_ref("key-2", ids[0], "m2")
    assert not catalog.add_block_ref("key-3", 10**9, "m1")
    assert list(catalog.chunks_without_block("default", "m1")) == ids[1:]
    assert list(catalog.chunks_without_block("default", "m3")) == ids
    assert list(catalog.block_keys()) == ["key-1", "key-2"]
    assert catalog.add_block_ref("key-2", ids[2], "m2")
    assert catalog.block_chunks("key-2") == [ids[0], ids[2]]
    assert catalog.block_chunks("key-3") == []
    assert catalog.forget_block("key-1") == 1
    assert list(catalog.chunks_without_block("default", "m1")) == ids


def test_a_copy_is_the_same_catalog_without_references(catalog, tmp_path):
    """With what another connection has written and not yet moved out of its log."""
    add(catalog, 1, chunks=3)
    with Catalog.open(catalog.path) as other:
        add(other, 2, namespace="other")
        ids = other.document_chunks("default", make_document(1).id)
        other.add_block_ref("key-1", ids[0], "m1")
        path = tmp_path / "copy.sqlite"
        catalog.write_copy(path)
    assert [file.name for file in tmp_path.glob("copy.sqlite*")] == [path.name]
    with Catalog.open(path) as copy:
        assert copy.identity == catalog.identity
        assert copy.generations() == catalog.generations()
        assert set(copy.generations()) == {"default", "other"}
        assert copy.chunk(ids) == catalog.chunk(ids)
        assert list(copy.block_keys()) == []
        assert copy.add_block_ref("key-2", ids[0], "m2")
        add(copy, 3)
        assert copy.generations() != catalog.generations()
    assert list(catalog.block_keys()) == ["key-1"]


def test_references_are_numbered_and_no_number_comes_twice(catalog):
    add(catalog, 1, chunks=700)
    ids = catalog.document_chunks("default", make_document(1).id)
    for chunk_id in ids:
        catalog.add_block_ref(f"key-{chunk_id}", chunk_id, "m")
    seen = list(catalog.block_refs_above(0))
    assert [key for _, key in seen] == [f"key-{chunk_id}" for chunk_id in ids]
    last, _ = seen[-1]
    assert list(catalog.block_refs_above(last)) == []
    catalog.add_block_ref(f"key-{ids[-1]}", ids[-1], "m")  # is there already
    assert list(catalog.block_refs_above(last)) == []
    catalog.delete_document("default", make_document(1).id)
    add(catalog, 2, chunks=1)
    (chunk_id,) = catalog.document_chunks("default", make_document(2).id)
    catalog.add_block_ref("key-1", chunk_id, "m")
    ((number, key),) = catalog.block_refs_above(last)
    assert (number > last, key) == (True, "key-1")


def test_iterators_page_and_see_changes(catalog):
    add(catalog, 1, chunks=1100)
    missing = catalog.chunks_without_block("default", "m")
    first = next(missing)
    catalog.delete_document("default", make_document(1).id)
    assert first > 0
    assert len(list(missing)) == 511  # the rest of the page that was read already
    add(catalog, 2, chunks=1100)
    ids = catalog.document_chunks("default", make_document(2).id)
    for chunk_id in ids:
        catalog.add_block_ref(f"key-{chunk_id:05}", chunk_id, "m")
    assert len(set(catalog.block_keys())) == 1100
    batches = list(catalog.iter_vectors("default", EMBEDDER, batch_rows=500))
    assert [len(batch_ids) for batch_ids, _ in batches] == [500, 500, 100]
    assert np.concatenate([batch_ids for batch_ids, _ in batches]).tolist() == ids
    assert catalog.vector_ids("default", EMBEDDER).tolist() == ids


def test_delete_names_only_the_orphaned_blocks(catalog):
    add(catalog, 1)
    add(catalog, 2)
    add(catalog, 1, namespace="other")
    ids = catalog.document_chunks("default", make_document(1).id)
    (kept, _) = catalog.document_chunks("default", make_document(2).id)
    catalog.add_block_ref("own", ids[0], "m")
    catalog.add_block_ref("own", ids[1], "m")
    catalog.add_block_ref("shared", ids[0], "m")
    catalog.add_block_ref("shared", kept, "m")
    deleted = catalog.delete_document("default", make_document(1).id)
    assert deleted.chunk_ids == tuple(ids)
    assert deleted.orphaned_block_keys == ("own",)
    assert catalog.delete_document("default", make_document(1).id) is None
    assert catalog.chunk(ids) == [None, None]
    assert catalog.token_ids(ids, TOKENIZER) == [None, None]
    assert list(catalog.block_keys()) == ["shared"]
    assert catalog.counts("default") == Counts(1, 2, 2, 1)
    assert catalog.document("other", make_document(1).id) is not None


def holding(folder, text):
    """Files in which the text can be read."""
    return [path.name for path in sorted(folder.iterdir()) if text in path.read_bytes()]


def secret_document(word):
    """Larger than a page, so that it lies in a chain of them."""
    text = f"{word} of Karsk is kept. " * 1000
    return Document(text, title=f"the {word}"), [ChunkInput(f"the {word}", text, [1])]


def add_secret(catalog, word):
    document, chunks = secret_document(word)
    catalog.add_document(
        "default",
        document,
        chunks,
        tokenizer=TOKENIZER,
        vectors=unit_vectors(1, 1),
        embedder=EMBEDDER,
    )
    return document.id


def test_deleted_text_is_in_no_file_any_more(tmp_path):
    """It stayed in the log while the catalog was open, and in unused pages for good."""
    with open_catalog(tmp_path) as catalog, open_catalog(tmp_path) as idle:
        kept, gone = add_secret(catalog, "Lantern"), add_secret(catalog, "Harpoon")
        assert holding(tmp_path, b"Harpoon")
        assert catalog.delete_document("default", gone) is not None
        assert holding(tmp_path, b"Harpoon") == []
        assert holding(tmp_path, b"Lantern")
        assert idle.document("default", kept) is not None
        idle.delete_document("default", kept)
        assert holding(tmp_path, b"Lantern") == []


def test_deleted_text_goes_with_the_next_write_where_somebody_was_reading(tmp_path):
    with open_catalog(tmp_path) as catalog:
        gone = add_secret(catalog, "Harpoon")
        with contextlib.closing(sqlite3.connect(catalog.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM documents").fetchone()
            assert catalog.delete_document("default", gone) is not None
            assert holding(tmp_path, b"Harpoon")
            reader.execute("COMMIT")
        add(catalog, 1)
        assert holding(tmp_path, b"Harpoon") == []


def test_the_blocks_that_a_document_leaves_are_owed_until_they_are_settled(tmp_path):
    with open_catalog(tmp_path) as catalog:
        add(catalog, 1)
        (first, _) = catalog.document_chunks("default", make_document(1).id)
        for key in ("a", "b", "c"):
            catalog.add_block_ref(key, first, "m")
        catalog.delete_document("default", make_document(1).id)
    with open_catalog(tmp_path) as catalog:
        assert list(catalog.owed_deletions()) == ["a", "b", "c"]
        catalog.settle_deletions(["a", "never"])
        assert list(catalog.owed_deletions()) == ["b", "c"]
        add(catalog, 2)
        (again, _) = catalog.document_chunks("default", make_document(2).id)
        catalog.add_block_ref("b", again, "m")
        assert list(catalog.owed_deletions()) == ["c"]


def test_chunk_ids_are_never_given_twice(catalog):
    add(catalog, 1)
    old = catalog.document_chunks("default", make_document(1).id)
    catalog.delete_document("default", make_document(1).id)
    add(catalog, 1)
    assert not set(old) & set(catalog.document_chunks("default", make_document(1).id))


def test_namespaces_do_not_see_each_other(catalog):
    add(catalog, 1, namespace="a")
    add(catalog, 2, namespace="b")
    ids = catalog.document_chunks("a", make_document(1).id)
    assert catalog.document("b", make_document(1).id) is None
    assert catalog.document_chunks("b", make_document(1).id) == []
    assert catalog.chunk(ids, namespace="b") == [None, None]
    assert catalog.delete_document("b", make_document(1).id) is None
    assert catalog.generation("c") == 0
    assert catalog.namespaces() == ["a", "b"]
    assert len(catalog.vector_ids("b", EMBEDDER)) == 2


def test_documents_are_paged_in_order_of_addition(catalog):
    for number in (3, 1, 2):
        add(catalog, number)
    assert [d.title for d in catalog.documents("default", limit=2)] == ["title 3", "title 1"]
    assert [d.title for d in catalog.documents("default", limit=2, offset=2)] == ["title 2"]
    with pytest.raises(ValueError, match="not be negative"):
        catalog.documents("default", limit=-1)


def test_settings(catalog):
    assert catalog.setting("n", "prefix") is None
    assert catalog.set_setting("n", "prefix", "one", overwrite=False) == "one"
    assert catalog.set_setting("n", "prefix", "two", overwrite=False) == "one"
    assert catalog.set_setting("n", "prefix", "two") == "two"
    assert catalog.setting("other", "prefix") is None


@pytest.mark.parametrize(
    "change",
    [
        {"vectors": np.zeros((2, 4), np.float32)},
        {"vectors": np.full((1, 4), np.nan, np.float32)},
        {"chunks": []},
        {"chunks": [ChunkInput("", "x", [])]},
        {"chunks": [ChunkInput("", "x", [-1])]},
        {"chunks": [ChunkInput("", "x", [2**32])]},
        {"namespace": ""},
        {"vectors": np.zeros((1, 5), np.float32)},
    ],
)
def test_inputs_that_do_not_line_up_change_nothing(catalog, change):
    good = {
        "namespace": "default",
        "document": Document("body"),
        "chunks": [ChunkInput("", "x", [1])],
        "tokenizer": "t",
        "vectors": np.zeros((1, 4), np.float32),
        "embedder": "e",
    }
    catalog.add_document(**{**good, "document": Document("another")})
    with pytest.raises(ValueError, match=r"."):
        catalog.add_document(**{**good, **change})
    assert catalog.counts() == Counts(1, 1, 1, 0)
    assert catalog.add_document(**good)


# ---- what can be wrong with the file ----------------------------------------------------------


def test_a_catalog_of_version_1_is_brought_up_to_date(tmp_path):
    references = [("key-1", 1, "a"), ("key-1", 2, "a"), ("key-2", 1, "b")]
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as db:
        db.executescript(_sqlite._STEPS[0])
        db.execute("INSERT INTO documents VALUES (1, 'default', 'd', '', '', NULL, 0)")
        for chunk_id in (1, 2):
            row = (chunk_id, "default", "d", chunk_id, "", "text")
            db.execute("INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?)", row)
        rows = [(chunk_id, scope, key, "default") for key, chunk_id, scope in references]
        db.executemany("INSERT INTO block_refs VALUES (?, ?, ?, ?)", rows)
        ((identity,),) = db.execute("SELECT value FROM settings").fetchall()
        db.execute(f"PRAGMA application_id = {_sqlite._APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
        db.commit()
    for _ in range(2):
        with open_catalog(tmp_path) as catalog:
            assert catalog.identity == identity
            assert catalog.counts() == Counts(1, 2, 0, 2)
            assert list(catalog.block_keys()) == ["key-1", "key-2"]
            assert [number for number, _ in catalog.block_refs_above(0)] == [1, 2, 3]
            assert list(catalog.chunks_without_block("default", "b")) == [2]
            assert list(catalog.owed_deletions()) == []
    with open_catalog(tmp_path) as catalog:
        assert catalog.add_block_ref("key-3", 2, "b")
        assert list(catalog.block_refs_above(3)) == [(4, "key-3")]
        deleted = catalog.delete_document("default", "d")
        assert deleted.orphaned_block_keys == ("key-1", "key-2", "key-3")
        assert list(catalog.block_refs_above(0)) == []
    with contextlib.closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA user_version").fetchone() == (_sqlite.SCHEMA_VERSION,)


def test_newer_schema_is_refused_by_name(tmp_path):
    open_catalog(tmp_path).close()
    db = sqlite3.connect(tmp_path / "catalog.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(CatalogError, match=r"version 99.*upgrade"):
        open_catalog(tmp_path)


def test_foreign_and_damaged_files(tmp_path):
    db = sqlite3.connect(tmp_path / "foreign")
    db.execute("CREATE TABLE x (y)")
    db.close()
    with pytest.raises(CatalogError, match="another program"):
        Catalog.open(tmp_path / "foreign")
    (tmp_path / "noise").write_bytes(b"noise" * 1000)
    with pytest.raises(CatalogError, match="not an SQLite database"):
        Catalog.open(tmp_path / "noise")
    with pytest.raises(CatalogError, match="cannot be opened"):
        Catalog.open(tmp_path)
    with pytest.raises(CatalogError, match="has no folder"):
        Catalog.open(tmp_path / "noise" / "catalog")


def test_pages_overwritten_under_the_catalog(tmp_path):
    with open_catalog(tmp_path) as catalog:
        add(catalog, 1, chunks=500)
    path = tmp_path / "catalog.sqlite"
    data = bytearray(path.read_bytes())
    data[8192:] = b"\xa5" * (len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(CatalogError, match="damaged"):
        read_everything(path)


def read_everything(path):
    with Catalog.open(path) as catalog:
        list(catalog.iter_vectors("default", EMBEDDER))
        list(catalog.chunks_without_block("default", "m"))
        catalog.documents("default")


def test_locked_by_another_process(tmp_path):
    with Catalog.open(tmp_path / "catalog.sqlite", busy_timeout_s=0.05) as catalog:
        other = sqlite3.connect(tmp_path / "catalog.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CatalogError, match="in use by another process"):
            add(catalog, 1)
        assert catalog.documents("default") == []  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        assert add(catalog, 1)


def test_full_disk_and_read_only(catalog):
    add(catalog, 1)
    pages = catalog._db.execute("PRAGMA page_count").fetchone()[0]
    catalog._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(CatalogError, match="disk is full"):
        add(catalog, 2, chunks=500)
    assert catalog.counts().documents == 1
    catalog._db.execute("PRAGMA max_page_count = 100000")
    catalog._db.execute("PRAGMA query_only = ON")
    with pytest.raises(CatalogError, match="read-only"):
        add(catalog, 2)
    catalog._db.execute("PRAGMA query_only = OFF")
    assert add(catalog, 2)


def test_closed_catalog(tmp_path):
    catalog = open_catalog(tmp_path)
    catalog.close()
    catalog.close()
    with pytest.raises(CatalogError, match="closed"):
        catalog.counts()
    with pytest.raises(CatalogError, match="closed"):
        add(catalog, 1)


def test_threads_and_two_connections(tmp_path):
    failures: list[Exception] = []
    added: list[bool] = []
    with open_catalog(tmp_path) as one, open_catalog(tmp_path) as two:

        def work(catalog: Catalog) -> None:
            try:
                for number in range(12):
                    added.append(add(catalog, number))
                    catalog.counts()
            except Exception as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(c,)) for c in (one, two, one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert sum(added) == 12
        assert one.counts() == two.counts() == Counts(12, 24, 24, 0)
