"""LlamaIndex's interfaces over an engine of this process and over a server."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.query_engine import RetrieverQueryEngine

from kvrag.engine import Engine
from kvrag.errors import InputError
from kvrag.integrations.llamaindex import KVRagLLM, KVRagRetriever
from tests.integrations.conftest import TEXTS
from tests.serving.harness import CHAIN_TEXT

QUESTION = "Who keeps the lamp?"
MESSAGES = [
    ChatMessage(role=MessageRole.SYSTEM, content="Be brief."),
    ChatMessage(role=MessageRole.USER, content=QUESTION),
]


def test_nodes_carry_a_handle_that_no_prompt_shows(source):
    (found,) = KVRagRetriever(source, k=1, search="dense").retrieve(f"T0\n{TEXTS[0]}\n\n")
    assert found.score == pytest.approx(1.0)
    assert found.node.text == TEXTS[0]
    assert set(found.node.metadata) == {"n", "source", "title", "kv_id", "kv_tier"}
    assert found.node.ref_doc_id
    assert "kv_" not in found.node.get_content(metadata_mode="llm")


def test_retrieving_as_a_coroutine(source):
    retriever = KVRagRetriever(source, k=2)
    nodes = asyncio.run(retriever.aretrieve(QUESTION))
    assert [node.node_id for node in nodes] == [n.node_id for n in retriever.retrieve(QUESTION)]


def test_an_empty_corpus_holds_nothing(make_settings):
    with Engine.open(make_settings()) as engine:
        assert KVRagRetriever(engine).retrieve(QUESTION) == []


def test_answers(source):
    llm = KVRagLLM(source=source, k=2, max_tokens=64)
    answer = llm.chat(MESSAGES)
    assert answer.message.content == CHAIN_TEXT
    assert len(answer.raw["sources"]) == 2
    usage = llm.complete(QUESTION).additional_kwargs
    assert usage["cached_tokens"] > 0
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    passages = llm.complete(QUESTION, passages=["The lamp is Anna's."]).raw["sources"]
    assert [passage["text"] for passage in passages] == ["The lamp is Anna's."]
    assert llm.metadata.is_chat_model


def test_streams(source):
    llm = KVRagLLM(source=source)
    chat = list(llm.stream_chat(MESSAGES))
    complete = list(llm.stream_complete(QUESTION))
    for responses in (chat, complete):
        assert "".join(response.delta for response in responses) == CHAIN_TEXT
        assert responses[-1].raw["answer"] == CHAIN_TEXT
    assert complete[-1].text == CHAIN_TEXT


def test_coroutines(source):
    async def talk() -> list[str]:
        llm = KVRagLLM(source=source)
        chat = [response.delta async for response in await llm.astream_chat(MESSAGES)]
        complete = [response.delta async for response in await llm.astream_complete(QUESTION)]
        return [
            (await llm.achat(MESSAGES)).message.content,
            (await llm.acomplete(QUESTION)).text,
            "".join(chat),
            "".join(complete),
        ]

    assert asyncio.run(talk()) == [CHAIN_TEXT] * 4


def test_a_query_engine(source):
    llm = KVRagLLM(source=source)
    engine = RetrieverQueryEngine.from_args(KVRagRetriever(source, k=2), llm=llm)
    response = engine.query(QUESTION)
    assert str(response) == CHAIN_TEXT
    assert len(response.source_nodes) == 2


def test_what_is_no_text_is_refused(engine):
    llm = KVRagLLM(source=engine)
    with pytest.raises(InputError, match="tools"):
        llm.chat([ChatMessage(role=MessageRole.TOOL, content="x")])
    with pytest.raises(InputError, match="max_token'"):
        llm.complete(QUESTION, max_token=3)
