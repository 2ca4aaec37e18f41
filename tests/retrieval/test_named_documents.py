"""Documents with ids of their own: kept whole, replaced in one transaction."""

from __future__ import annotations

import pytest

from kvrag.retrieval import Catalog, ChunkInput, Document, DocumentError
from tests.retrieval.helpers import (
    EMBEDDER,
    TOKENIZER,
    add,
    make_document,
    open_catalog,
    unit_vectors,
)


@pytest.fixture
def catalog(tmp_path):
    with open_catalog(tmp_path) as catalog:
        yield catalog


def replace(catalog: Catalog, document: Document, *, vectors=None):
    return catalog.replace_document(
        "default",
        document,
        [ChunkInput(document.title, document.text, [1, 2])],
        tokenizer=TOKENIZER,
        vectors=unit_vectors(1, 1) if vectors is None else vectors,
        embedder=EMBEDDER,
    )


def test_a_given_id_is_kept():
    document = Document("text", id="a/b ü")
    assert (document.id, document.is_named) == ("a/b ü", True)
    assert not Document("text").is_named
    assert Document("a").id != Document("b").id


@pytest.mark.parametrize("id", [".", "..", "x" * 257, "\ud800", 3])
def test_ids_that_are_refused(id):
    with pytest.raises(DocumentError, match="id"):
        Document("text", id=id)


def test_the_text_is_kept_whole_until_the_document_goes(catalog):
    add(catalog, 1)
    assert catalog.document_text("default", make_document(1).id) is None
    replace(catalog, Document("  text\n", id="a"))
    assert catalog.document_text("default", "a") == "  text\n"
    assert catalog.document_text("other", "a") is None
    catalog.delete_document("default", "a")
    assert catalog.document_text("default", "a") is None


def test_replacing_leaves_one_and_tells_what_went(catalog):
    assert replace(catalog, Document("first", id="a")) is None
    (chunk_id,) = catalog.document_chunks("default", "a")
    catalog.add_block_ref("key", chunk_id, "scope")
    generation = catalog.generation("default")
    deleted = replace(catalog, Document("second", id="a"))
    assert (deleted.chunk_ids, deleted.orphaned_block_keys) == ((chunk_id,), ("key",))
    assert list(catalog.owed_deletions()) == ["key"]
    assert catalog.document_text("default", "a") == "second"
    assert (catalog.counts().documents, catalog.counts().chunks) == (1, 1)
    assert catalog.generation("default") > generation


def test_what_fails_in_the_middle_leaves_the_first(catalog):
    replace(catalog, Document("first", id="a"))
    with pytest.raises(ValueError, match="shape"):
        replace(catalog, Document("second", id="a"), vectors=unit_vectors(1, 2))
    assert catalog.document_text("default", "a") == "first"
    assert catalog.counts().chunks == 1


def test_describing_changes_no_chunk(catalog):
    replace(catalog, Document("text", id="a"))
    before = catalog.document_chunks("default", "a")
    assert catalog.describe_document("default", Document("text", "", "s", {"a": 1}, id="a"))
    stored = catalog.document("default", "a")
    assert (stored.source, stored.metadata) == ("s", {"a": 1})
    assert catalog.document_chunks("default", "a") == before
    assert not catalog.describe_document("default", Document("text", id="b"))
