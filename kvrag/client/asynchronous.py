"""`AsyncKVRagClient`: the REST API as coroutines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Self, TypeVar

import httpx
from httpx_retries import RetryTransport
from httpx_sse import EventSource
from pydantic import BaseModel

from kvrag.client import calls
from kvrag.client.calls import Call, DocumentInput, Messages
from kvrag.client.connection import Waiting, extensions, tls
from kvrag.client.errors import RefusedError, translated
from kvrag.client.events import AnswerEvents
from kvrag.client.results import (
    Added,
    Answer,
    Document,
    DocumentPage,
    Health,
    RetrievedChunk,
    Source,
)

__all__ = ["AsyncAnswerStream", "AsyncKVRagClient"]

R = TypeVar("R", bound=BaseModel)


class AsyncAnswerStream:
    """Iterate once over pieces of text; then `.answer` holds the whole.

    Closing it, or leaving its `async with` block, ends the answer on the server.
    """

    def __init__(self, url: str, response: httpx.Response) -> None:
        self._url, self._response = url, response
        self._events, self._closed = AnswerEvents(), False
        self._pieces = self._run()

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    async def __anext__(self) -> str:
        return await anext(self._pieces)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    @property
    def sources(self) -> list[Source]:
        """Chunks of the prompt; there from the first piece on."""
        return self._events.sources

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises UnfinishedStreamError before the stream's end."""
        return self._events.answer

    async def aclose(self) -> None:
        """End the connection. A second call does nothing."""
        self._closed = True
        await self._response.aclose()

    async def _run(self) -> AsyncIterator[str]:
        async with aclosing(self):
            with translated(self._url, lambda: self._closed):
                async with aclosing(EventSource(self._response).aiter_sse()) as events:
                    async for event in events:
                        if piece := self._events.take(event):
                            yield piece
                        if self._events.done:
                            break
        self._events.finish()


class AsyncKVRagClient:
    """`KVRagClient` with coroutines, for one event loop. Arguments and errors are the same."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 5.0,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._waiting = Waiting(timeout_s, connect_timeout_s, retries)
        with translated(url):
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers=headers,
                timeout=self._waiting.timeout,
                transport=RetryTransport(
                    transport or httpx.AsyncHTTPTransport(verify=tls(url)), self._waiting.retry()
                ),
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. A second call does nothing."""
        await self._http.aclose()

    async def ask(self, question: str, **options: Any) -> Answer:
        """Answer a question. Options: those of `POST /v1/rag/query`, as passages, k, max_tokens."""
        return await self._send(calls.ask(question, **options))

    async def chat(self, messages: Messages, **options: Any) -> Answer:
        """Answer the last of `{"role", "content"}` messages. Options: those of `ask`."""
        return await self._send(calls.chat(messages, **options))

    async def stream(self, question: str, **options: Any) -> AsyncAnswerStream:
        """As `ask`, piece by piece. What is refused is raised here."""
        return await self._open(calls.ask(question, stream=True, **options))

    async def stream_chat(self, messages: Messages, **options: Any) -> AsyncAnswerStream:
        """As `chat`, piece by piece. What is refused is raised here."""
        return await self._open(calls.chat(messages, stream=True, **options))

    async def retrieve(
        self, question: str, *, k: int | None = None, prefetch: bool = False, **search: Any
    ) -> list[RetrievedChunk]:
        """The `k` best chunks with handles on their KV.

        search: `search`, `where`, `mmr`, `distinct`, `rerank`.
        """
        return (await self._send(calls.retrieve(question, k=k, prefetch=prefetch, **search))).chunks

    async def add(self, *documents: DocumentInput) -> Added:
        """Add documents, at most 1000, and compute their KV. May be repeated without harm."""
        return await self._send(calls.add(documents))

    async def documents(self, *, limit: int = 100, offset: int = 0) -> DocumentPage:
        """Documents in the order in which they were added."""
        return await self._send(calls.documents(limit=limit, offset=offset))

    async def all_documents(self, *, page: int = 100) -> AsyncIterator[Document]:
        """Every document, page by page."""
        offset = 0
        while found := (await self.documents(limit=page, offset=offset)).documents:
            for document in found:
                yield document
            offset += len(found)

    async def document(self, id: str) -> Document | None:
        """One document, or None."""
        try:
            return await self._send(calls.document(id))
        except RefusedError as exc:
            if exc.code != "unknown_document":
                raise
            return None

    async def delete(self, id: str) -> bool:
        """Delete a document; False if absent."""
        try:
            return (await self._send(calls.delete(id))).deleted
        except RefusedError as exc:
            if exc.code != "unknown_document":
                raise
            return False

    async def health(self) -> Health:
        """Never waits for the model."""
        return await self._send(calls.health())

    async def _send(self, call: Call[R]) -> R:
        with translated(self.url):
            return call.result(await self._http.send(self._request(call)))

    async def _open(self, call: Call[Answer]) -> AsyncAnswerStream:
        with translated(self.url):
            response = await self._http.send(self._request(call), stream=True)
            if response.status_code != 200:
                async with aclosing(response):
                    await response.aread()
                raise calls.api_error(response)
        return AsyncAnswerStream(self.url, response)

    def _request(self, call: Call[Any]) -> httpx.Request:
        return self._http.build_request(
            call.method,
            call.path,
            json=call.body,
            params=call.query,
            extensions=extensions(call, self._waiting),
        )
