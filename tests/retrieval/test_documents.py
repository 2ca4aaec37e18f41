from __future__ import annotations

import dataclasses

import pytest

from kvrag.retrieval import Document, DocumentError


def test_same_content_same_id():
    first = Document("body", "Title", source="a.txt", metadata={"n": 1})
    second = Document("body", "  Title\n", source="b.txt")
    assert first.id == second.id
    assert len(first.id) == 32
    assert int(first.id, 16) >= 0


def test_title_and_text_do_not_run_together():
    assert Document("bc", "a").id != Document("c", "ab").id


def test_metadata_is_copied_and_frozen_fields_stay():
    metadata = {"tags": ["x"]}
    document = Document("body", metadata=metadata)
    metadata["tags"].append("y")
    assert document.metadata == {"tags": ["x"]}
    assert hash(document) == hash(Document("body"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        document.text = "other"


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ""},
        {"text": " \n\t\u3000"},
        {"text": 7},
        {"text": "body", "title": None},
        {"text": "lone \ud800"},
        {"text": "body", "title": "\udfff"},
        {"text": "body", "metadata": {1: 2}},
        {"text": "body", "metadata": {"a": object()}},
        {"text": "body", "metadata": {"a": float("nan")}},
        {"text": "body", "metadata": {"a": "\ud800"}},
        {"text": "body", "metadata": []},
    ],
)
def test_bad_documents_are_refused(fields):
    with pytest.raises(DocumentError):
        Document(**fields)


def test_size_is_bounded(monkeypatch):
    monkeypatch.setattr("kvrag.retrieval.documents.MAX_DOCUMENT_BYTES", 10)
    Document("x" * 10)
    with pytest.raises(DocumentError, match="11 bytes"):
        Document("é" * 5, "t")
