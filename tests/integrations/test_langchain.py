"""What LangChain's own tests do not ask: handles, documents, streams that end early, coroutines."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from kvrag.engine import Engine
from kvrag.errors import CorpusSettingsError, InputError
from kvrag.integrations.langchain import (
    ChatKVRag,
    KVRagRetriever,
    KVRagVectorStore,
    LangChainEmbedder,
)
from tests.integrations.conftest import TEXTS
from tests.serving.harness import CHAIN_TEXT, fails_after_two, health, wait_until

QUESTION = "Who keeps the lamp?"


def test_documents_carry_a_handle_and_neither_path_nor_tensor(source, engine):
    (document,) = KVRagRetriever(source=source, k=1, search="dense").invoke(f"T0\n{TEXTS[0]}\n\n")
    assert document.page_content == TEXTS[0]
    metadata = dict(document.metadata)
    assert metadata.pop("score") == pytest.approx(1.0)
    (item,) = engine.retrieve(f"T0\n{TEXTS[0]}\n\n", k=1)
    assert metadata == {
        "n": 0,
        "source": "",
        "title": "T0",
        "document_id": item.chunk.document,
        "kv_id": str(item.handle.key),
        "kv_tier": item.handle.tier,
    }
    assert item.handle.tier == "ram" or item.handle.tier == "disk"


def test_an_answer_rests_on_documents_chunks_or_the_conversation(source):
    model = ChatKVRag(source=source)
    assert model.invoke(QUESTION).response_metadata["sources"] == []
    bound = model.bind(documents=["The lamp is Anna's."])
    (given,) = bound.invoke(QUESTION).response_metadata["sources"]
    assert (given["document"], given["text"]) == (None, "The lamp is Anna's.")
    found = ChatKVRag(source=source, k=3).invoke(QUESTION).response_metadata["sources"]
    assert len(found) == 3
    assert all(chunk["document"] for chunk in found)


def test_a_filter_reaches_retriever_chat_and_store(source, engine):
    where = {"n": {"gte": 2}}
    retriever = KVRagRetriever(source=source, k=9, where=where)
    assert {document.metadata["n"] for document in retriever.invoke(QUESTION)} == {2, 3}
    message = ChatKVRag(source=source, where=where, search="dense", k=9).invoke(QUESTION)
    assert {chunk["title"] for chunk in message.response_metadata["sources"]} == {"T2", "T3"}
    found = KVRagVectorStore(source).similarity_search(QUESTION, k=9, filter=where)
    assert {document.metadata["n"] for document in found} == {2, 3}


def test_a_chain(source):
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "{question}")])
    model = ChatKVRag(source=source)
    chain = prompt | model.over(KVRagRetriever(source=source, k=2))
    message = chain.invoke({"question": QUESTION})
    assert message.content == CHAIN_TEXT
    # The blocks of the corpus, though the chunks came as passages.
    assert [chunk["tier"] for chunk in message.response_metadata["sources"]].count("computed") == 0
    text = chain | StrOutputParser()
    pieces = list(text.stream({"question": QUESTION}))
    assert len(pieces) > 1
    assert "".join(pieces) == CHAIN_TEXT
    assert asyncio.run(text.ainvoke({"question": QUESTION})) == CHAIN_TEXT


def test_usage_counts_what_was_reused(source):
    model = ChatKVRag(source=source, k=2)
    model.invoke(QUESTION)
    message = model.invoke(QUESTION)
    usage, report = message.usage_metadata, message.response_metadata["report"]
    assert usage["input_tokens"] == report["tokens"]["prompt"]
    assert usage["input_token_details"]["cache_read"] == report["tokens"]["reused"] > 0
    assert message.response_metadata["finish_reason"] == "stop"


def test_conversations(source):
    messages = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": "Who?"}]),
        AIMessage("Anna."),
        HumanMessage(QUESTION),
    ]
    assert ChatKVRag(source=source).invoke(messages).content == CHAIN_TEXT


@pytest.mark.parametrize(
    "message",
    [
        ToolMessage("x", tool_call_id="1"),
        HumanMessage([{"type": "image", "url": "http://localhost/x.png"}]),
    ],
)
def test_what_is_no_text_is_refused(engine, message):
    with pytest.raises(InputError, match=r"tools|only text"):
        ChatKVRag(source=engine).invoke([message])


def test_unknown_options_are_refused(engine):
    with pytest.raises(InputError, match="max_token'"):
        ChatKVRag(source=engine).invoke(QUESTION, max_token=3)


def test_a_source_that_is_none():
    with pytest.raises(ValueError, match="give an Engine or a URL"):
        KVRagRetriever(source=3)


def slowly(pieces):
    for piece in pieces:
        time.sleep(0.05)
        yield piece


@pytest.fixture
def changed(engine):
    """`changed(pieces)` changes the pieces of every answer."""

    def change(pieces) -> None:
        engine.pieces = pieces

    yield change
    engine.pieces = None


def test_the_loop_runs_while_an_answer_is_made(source, changed):
    """A blocked loop would count once a piece."""
    changed(slowly)

    async def talk() -> tuple[int, int]:
        beats, done = 0, False

        async def beat() -> None:
            nonlocal beats
            while not done:
                beats += 1
                await asyncio.sleep(0.001)

        heart = asyncio.create_task(beat())
        pieces = [chunk async for chunk in ChatKVRag(source=source).astream(QUESTION)]
        done = True
        await heart
        return len(pieces), beats

    pieces, beats = asyncio.run(talk())
    assert beats > 3 * pieces


def test_leaving_a_stream_ends_the_answer(source, engine, changed):
    changed(slowly)
    before = len(engine.streams)
    stream = ChatKVRag(source=source).stream(QUESTION)
    next(stream)
    stream.close()

    async def leave() -> None:
        stream = ChatKVRag(source=source).astream(QUESTION)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    assert len(engine.streams) == before + 2
    if isinstance(source, str):
        wait_until(lambda: health(source)["running"] == 0, "both answers ended")


def test_a_failure_on_the_way_is_raised(source, changed):
    changed(fails_after_two)

    async def talk() -> None:
        async for _ in ChatKVRag(source=source).astream(QUESTION):
            pass

    with pytest.raises(Exception, match=r"secret detail|internal error"):
        asyncio.run(talk())
    with pytest.raises(Exception, match=r"secret detail|internal error"):
        list(ChatKVRag(source=source).stream(QUESTION))


def test_an_empty_corpus_holds_nothing(make_settings):
    with Engine.open(make_settings()) as engine:
        assert KVRagRetriever(source=engine).invoke(QUESTION) == []


def test_a_store_gives_texts_back_whole_and_finds_parts(make_settings):
    text = " ".join(f"The lamp number {i} is lit." for i in range(60))
    embedding = DeterministicFakeEmbedding(size=6)
    store = KVRagVectorStore.from_texts(
        [f"  {text}\n"], embedding, [{"title": "Lamps"}], ids=["a"], source=make_settings()
    )
    (whole,) = store.get_by_ids(["a"])
    assert whole.page_content == f"  {text}\n"
    parts = store.similarity_search_with_score("lamp", k=3)
    assert len(parts) == 3
    for part, score in parts:
        assert (part.id, part.metadata) == ("a", {"title": "Lamps"})
        assert part.page_content in text
        assert -1 <= score <= 1
    assert store.as_retriever(search_kwargs={"k": 1}).invoke("lamp")[0].id == "a"
    (best,) = store.similarity_search_with_relevance_scores("lamp", k=1)
    assert 0 <= best[1] <= 1
    with pytest.raises(InputError, match="ids to delete"):
        store.delete()
    store.close()


def test_a_store_of_other_embeddings_is_refused(engine, url):
    embedding = DeterministicFakeEmbedding(size=6)
    for source in (engine, url):
        with pytest.raises(InputError, match="embedd"):
            KVRagVectorStore(source, embedding)


def test_embedders_are_told_apart_by_name_and_width():
    def fingerprint(size: int, **name: str) -> str:
        return LangChainEmbedder(DeterministicFakeEmbedding(size=size), **name).fingerprint

    assert fingerprint(6) == fingerprint(6)
    assert len({fingerprint(6), fingerprint(7), fingerprint(6, name="a")}) == 3


def test_a_corpus_of_another_embedder_is_refused(make_settings):
    settings = make_settings()
    with closing(KVRagVectorStore(settings, DeterministicFakeEmbedding(size=6))) as store:
        store.add_texts(["foo", "bar"], ids=["1", "2"])
        assert store.similarity_search("bar", k=1)[0].id == "2"
    with closing(KVRagVectorStore(settings, DeterministicFakeEmbedding(size=9))) as store:
        with pytest.raises(CorpusSettingsError, match="rebuild"):
            store.add_texts(["foo"], ids=["1"])
        with pytest.raises(CorpusSettingsError, match="embedder"):
            store.similarity_search("bar", k=1)
