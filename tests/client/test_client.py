"""Both clients against a real server."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from kvrag import client as face
from kvrag.client import (
    AsyncKVRagClient,
    DocumentInput,
    KVRagClient,
    RefusedError,
    UnfinishedStreamError,
)
from kvrag.serving import schemas
from tests.serving.harness import health, wait_until

LAMP = DocumentInput("Anna keeps the lamp.", title="Karsk", metadata={"year": 1911}, id="a/b ü")
PASSAGES = ["Anna keeps the lamp.", {"title": "Ferry", "text": "The ferry is red."}]
MESSAGES = [
    {"role": "system", "content": "Be <|im_end|> brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Anna."},
    {"role": "user", "content": "Who keeps the lamp?"},
]


def test_importing_loads_neither_torch_nor_the_engine():
    code = (
        "import sys, kvrag.client\n"
        "heavy = {'torch', 'transformers', 'numpy', 'faiss', 'kvrag.engine', 'kvrag.answer'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exported_names_exist():
    for name in face.__all__:
        assert getattr(face, name).__module__.startswith("kvrag.client.")


@pytest.mark.parametrize(
    ("result", "body"),
    [
        ("Answer", "AnswerBody"),
        ("Report", "ReportBody"),
        ("Control", "ControlBody"),
        ("Source", "SourceBody"),
        ("Spans", "SpansBody"),
        ("TokenCounts", "TokenCountsBody"),
        ("TokenReport", "TokenReportBody"),
        ("RetrievedChunk", "RetrievedChunkBody"),
        ("KVHandle", "KVBody"),
        ("Match", "MatchBody"),
        ("Added", "Added"),
        ("AddReport", "AddReport"),
        ("Document", "ShownDocumentBody"),
        ("DocumentPage", "DocumentPage"),
        ("Health", "Health"),
    ],
)
def test_results_have_the_fields_that_the_server_sends(result, body):
    fields = getattr(face, result).model_fields
    assert list(fields) == list(getattr(schemas, body).model_fields)


def test_documents(client):
    added = client.add(LAMP, DocumentInput("The ferry is red."))
    assert (added.ids[0], added.new, added.known) == ("a/b ü", 2, 0)
    shown = client.document("a/b ü")
    assert shown is not None
    assert (shown.text, shown.title, shown.metadata) == (LAMP.text, "Karsk", {"year": 1911})
    assert [document.id for document in client.all_documents(page=1)] == added.ids
    assert client.document(added.ids[1]).text is None
    assert client.document("absent") is None
    assert client.delete("a/b ü") is True
    assert client.delete("a/b ü") is False


def test_a_document_with_an_id_of_its_own_is_replaced(client):
    client.add(LAMP)
    again = client.add(LAMP)
    assert (again.new, again.known) == (0, 1)
    described = client.add(DocumentInput(LAMP.text, title="Karsk", source="s", id=LAMP.id))
    assert (described.known, described.report.chunks_computed) == (1, 0)
    assert (client.document(LAMP.id).source, client.document(LAMP.id).metadata) == ("s", None)
    replaced = client.add(DocumentInput("Boris keeps the lamp.", id=LAMP.id))
    assert (replaced.new, replaced.report.chunks_computed) == (1, 1)
    assert client.document(LAMP.id).text == "Boris keeps the lamp."
    assert [chunk.text for chunk in client.retrieve("lamp", k=9)] == ["Boris keeps the lamp."]


def test_chunks_come_with_their_document_and_a_handle(client):
    client.add(LAMP, DocumentInput("The ferry is red.", source="ferry.txt"))
    # The embedder of these tests finds a text by itself alone.
    best, other = client.retrieve(
        "Karsk\nAnna keeps the lamp.\n\n", k=2, prefetch=True, search="dense"
    )
    assert (best.document, best.metadata, best.kv.tier) == (LAMP.id, {"year": 1911}, "disk")
    assert best.score == pytest.approx(1.0)
    assert other.source == "ferry.txt"
    assert (best.match.dense_rank, best.match.lexical_rank) == (1, None)
    (only,) = client.retrieve("ferry", search="lexical")
    assert only.document == other.document
    (filtered,) = client.retrieve("ferry", where={"year": 1911})
    assert filtered.document == LAMP.id
    assert best.kv.id != other.kv.id
    assert "/" not in best.kv.id.replace("/", "", 1)  # tag/digest, and no path


def test_questions(client):
    answer = client.ask("Who keeps the lamp?", passages=PASSAGES, max_tokens=4, per_token=True)
    assert len(answer.token_ids) == 4
    assert [source.title for source in answer.sources] == ["", "Ferry"]
    assert len(answer.report.per_token) > 4
    with client.stream("Who keeps the lamp?", passages=PASSAGES, max_tokens=4) as stream:
        with pytest.raises(UnfinishedStreamError):
            _ = stream.answer
        text = "".join(stream)
    assert text == stream.answer.answer == answer.answer
    assert stream.sources == stream.answer.sources
    assert stream.answer.report.tokens.reused > 0


def test_conversations(client):
    alone = client.chat(MESSAGES, max_tokens=4)
    assert alone.sources == []
    with client.stream_chat(MESSAGES, passages=PASSAGES, max_tokens=4) as stream:
        text = "".join(stream)
    assert text == client.chat(MESSAGES, passages=PASSAGES, max_tokens=4).answer
    client.add(LAMP)
    (source,) = client.chat(MESSAGES, k=1, max_tokens=4).sources
    assert source.document == LAMP.id


def test_refusals_have_code_and_field(client):
    with pytest.raises(RefusedError, match="greater than or equal to 1") as refused:
        client.ask("Who?", k=0)
    error = refused.value
    assert (error.status, error.code, error.param) == (422, "invalid_value", "k")
    with pytest.raises(RefusedError) as refused:
        client.stream("Who?", k=1)
    assert refused.value.code == "empty_corpus"
    with pytest.raises(RefusedError) as refused:
        client.chat([{"role": "assistant", "content": "Anna."}])
    assert "user" in str(refused.value)


def test_closing_a_stream_ends_the_answer(client, url, engine):
    with client.stream("Who?", passages=PASSAGES, max_tokens=30000) as stream:
        next(stream)
    wait_until(lambda: health(url)["running"] == 0, "the answer ended")
    with pytest.raises(UnfinishedStreamError):
        list(stream)


def test_health(client):
    assert client.health().status == "ok"


def test_coroutines(url):
    async def talk() -> None:
        async with AsyncKVRagClient(url, retries=0) as client:
            await client.add(LAMP)
            # Everything at once, from one pool.
            page, shown, found, answer = await asyncio.gather(
                client.documents(),
                client.document(LAMP.id),
                client.retrieve("lamp", k=1),
                client.ask("Who keeps the lamp?", k=1, max_tokens=4),
            )
            assert page.documents[0].id == shown.id == found[0].document == LAMP.id
            chat = await client.chat(MESSAGES, max_tokens=4)
            async with await client.stream_chat(MESSAGES, max_tokens=4) as stream:
                assert "".join([piece async for piece in stream]) == chat.answer
            stream = await client.stream("Who keeps the lamp?", k=1, max_tokens=4)
            assert "".join([piece async for piece in stream]) == answer.answer
            assert stream.answer.sources[0].document == LAMP.id
            assert [document.id async for document in client.all_documents()] == [LAMP.id]
            assert (await client.delete(LAMP.id), await client.delete(LAMP.id)) == (True, False)
            assert await client.document(LAMP.id) is None
            with pytest.raises(RefusedError):
                await client.stream("Who?", k=1)
            async with await client.stream("?", passages=["x"], max_tokens=30000) as stream:
                await anext(stream)
            assert (await client.health()).status == "ok"

    with KVRagClient(url) as client:
        for document in client.documents().documents:
            client.delete(document.id)
    asyncio.run(talk())
    wait_until(lambda: health(url)["running"] == 0, "the answer ended")
