"""Documents over HTTP."""

from __future__ import annotations

import httpx
import pytest

from tests.serving.harness import busy, health, wait_until

KARSK = {
    "title": "Karsk",
    "text": "Anna keeps the lamp of Karsk.",
    "source": "karsk.txt",
    "metadata": {"year": 1911, "names": ["Anna", "東京"]},
}


def test_add_list_show_delete(url):
    added = httpx.post(f"{url}/v1/documents", json=KARSK)
    assert added.status_code == 200
    content = added.json()
    (document_id,) = content["ids"]
    assert (content["new"], content["known"], content["chunks"]) == (1, 0, 1)
    assert content["report"]["chunks_computed"] == 1
    assert content["report"]["tokens_computed"] > 0
    assert content["report"]["bytes_written"] > 0

    page = httpx.get(f"{url}/v1/documents").json()
    assert (page["limit"], page["offset"]) == (100, 0)
    (shown,) = page["documents"]
    assert {name: shown[name] for name in ("title", "source", "metadata")} == {
        name: KARSK[name] for name in ("title", "source", "metadata")
    }
    assert httpx.get(f"{url}/v1/documents/{document_id}").json() == shown | {"text": None}

    deleted = httpx.delete(f"{url}/v1/documents/{document_id}")
    assert deleted.json() == {"id": document_id, "deleted": True}
    for method in (httpx.get, httpx.delete):
        absent = method(f"{url}/v1/documents/{document_id}")
        assert absent.status_code == 404
        assert absent.json()["error"]["code"] == "unknown_document"
        assert absent.json()["error"]["param"] == "id"


def test_adding_the_same_twice_changes_nothing(url):
    first = httpx.post(f"{url}/v1/documents", json=KARSK).json()
    before = httpx.get(f"{url}/v1/documents").json()
    again = httpx.post(f"{url}/v1/documents", json={"documents": [KARSK, KARSK]}).json()
    assert again["ids"] == first["ids"] * 2
    assert (again["new"], again["known"], again["chunks"]) == (0, 2, 1)
    assert (again["report"]["chunks_computed"], again["report"]["bytes_written"]) == (0, 0)
    assert httpx.get(f"{url}/v1/documents").json() == before


def test_a_report_counts_the_documents_of_its_request(url):
    first = {"documents": [{"text": f"Lamp number {i}."} for i in range(3)]}
    httpx.post(f"{url}/v1/documents", json=first)
    content = httpx.post(f"{url}/v1/documents", json=KARSK).json()
    report = content["report"]
    assert content["chunks"] == 1
    assert (report["chunks_computed"], report["chunks_stored_before"]) == (1, 0)


def test_pages(url):
    documents = [{"text": f"Lamp number {i}."} for i in range(5)]
    ids = httpx.post(f"{url}/v1/documents", json={"documents": documents}).json()["ids"]
    page = httpx.get(f"{url}/v1/documents", params={"limit": 2, "offset": 2}).json()
    assert [document["id"] for document in page["documents"]] == ids[2:4]
    assert httpx.get(f"{url}/v1/documents", params={"offset": 5}).json()["documents"] == []


def test_reading_does_not_wait_for_the_model(url):
    (document_id,) = httpx.post(f"{url}/v1/documents", json=KARSK).json()["ids"]
    with busy(url):
        assert httpx.get(f"{url}/v1/documents", timeout=60).status_code == 200
        assert httpx.get(f"{url}/v1/documents/{document_id}", timeout=60).status_code == 200
        assert httpx.get(f"{url}/openapi.json", timeout=60).status_code == 200
        assert health(url)["running"] == 1


def test_a_client_that_leaves_while_adding_ends_it_and_keeps_what_was_stored(url, engine):
    documents = [{"text": f"Lamp number {i}. " * 300} for i in range(300)]
    patience = httpx.Timeout(60, read=0.5)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/documents", json={"documents": documents}, timeout=patience)
    wait_until(lambda: health(url)["running"] == 0, "the addition ended")
    kept = len(engine.documents(limit=1000))
    assert kept < 300
    again = httpx.post(f"{url}/v1/documents", json={"documents": documents[:2]}, timeout=60).json()
    assert again["known"] == min(kept, 2)
    assert again["new"] == 2 - again["known"]
