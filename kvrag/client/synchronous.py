"""`KVRagClient`: the REST API as methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
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

__all__ = ["AnswerStream", "KVRagClient"]

R = TypeVar("R", bound=BaseModel)


class AnswerStream:
    """Iterate once over pieces of text; then `.answer` holds the whole.

    Closing it, or leaving its `with` block, ends the answer on the server.
    """

    def __init__(self, url: str, response: httpx.Response) -> None:
        self._url, self._response = url, response
        self._events, self._closed = AnswerEvents(), False
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def sources(self) -> list[Source]:
        """Chunks of the prompt; there from the first piece on."""
        return self._events.sources

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises UnfinishedStreamError before the stream's end."""
        return self._events.answer

    def close(self) -> None:
        """End the connection. A second call does nothing."""
        self._closed = True
        self._response.close()

    def _run(self) -> Iterator[str]:
        with closing(self), translated(self._url, lambda: self._closed):
            for event in EventSource(self._response).iter_sse():
                if piece := self._events.take(event):
                    yield piece
                if self._events.done:
                    break
        self._events.finish()


class KVRagClient:
    """A connection pool to one server. Thread-safe. Close it, or use it as a context manager.

    Args:
        url: such as `http://127.0.0.1:8321`.
        timeout_s: longest wait for the next byte; an answer that is not streamed comes as one.
        connect_timeout_s: longest wait for a connection.
        retries: how often a request is repeated that may be: when no connection came about, when
            the queue is full (Retry-After is obeyed) or the server stops; requests that only read
            also when the answer was lost.
        headers: sent with each request.
        transport: below the repetitions; for tests and proxies.

    Each method raises `RefusedError`, `ServerError`, `UnreachableError` or `BadReplyError`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 5.0,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._waiting = Waiting(timeout_s, connect_timeout_s, retries)
        with translated(url):
            self._http = httpx.Client(
                base_url=self.url,
                headers=headers,
                timeout=self._waiting.timeout,
                transport=RetryTransport(
                    transport or httpx.HTTPTransport(verify=tls(url)), self._waiting.retry()
                ),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. A second call does nothing."""
        self._http.close()

    def ask(self, question: str, **options: Any) -> Answer:
        """Answer a question. Options: those of `POST /v1/rag/query`, as passages, k, max_tokens."""
        return self._send(calls.ask(question, **options))

    def chat(self, messages: Messages, **options: Any) -> Answer:
        """Answer the last of `{"role", "content"}` messages. Options: those of `ask`."""
        return self._send(calls.chat(messages, **options))

    def stream(self, question: str, **options: Any) -> AnswerStream:
        """As `ask`, piece by piece. What is refused is raised here."""
        return self._open(calls.ask(question, stream=True, **options))

    def stream_chat(self, messages: Messages, **options: Any) -> AnswerStream:
        """As `chat`, piece by piece. What is refused is raised here."""
        return self._open(calls.chat(messages, stream=True, **options))

    def retrieve(
        self, question: str, *, k: int | None = None, prefetch: bool = False, **search: Any
    ) -> list[RetrievedChunk]:
        """The `k` best chunks with handles on their KV.

        search: `search`, `where`, `mmr`, `distinct`, `rerank`.
        """
        return self._send(calls.retrieve(question, k=k, prefetch=prefetch, **search)).chunks

    def add(self, *documents: DocumentInput) -> Added:
        """Add documents, at most 1000, and compute their KV. May be repeated without harm."""
        return self._send(calls.add(documents))

    def documents(self, *, limit: int = 100, offset: int = 0) -> DocumentPage:
        """Documents in the order in which they were added."""
        return self._send(calls.documents(limit=limit, offset=offset))

    def all_documents(self, *, page: int = 100) -> Iterator[Document]:
        """Every document, page by page."""
        offset = 0
        while found := self.documents(limit=page, offset=offset).documents:
            yield from found
            offset += len(found)

    def document(self, id: str) -> Document | None:
        """One document, or None."""
        try:
            return self._send(calls.document(id))
        except RefusedError as exc:
            if exc.code != "unknown_document":
                raise
            return None

    def delete(self, id: str) -> bool:
        """Delete a document; False if absent."""
        try:
            return self._send(calls.delete(id)).deleted
        except RefusedError as exc:
            if exc.code != "unknown_document":
                raise
            return False

    def health(self) -> Health:
        """Never waits for the model."""
        return self._send(calls.health())

    def _send(self, call: Call[R]) -> R:
        with translated(self.url):
            return call.result(self._http.send(self._request(call)))

    def _open(self, call: Call[Answer]) -> AnswerStream:
        with translated(self.url):
            response = self._http.send(self._request(call), stream=True)
            if response.status_code != 200:
                with closing(response):
                    response.read()
                raise calls.api_error(response)
        return AnswerStream(self.url, response)

    def _request(self, call: Call[Any]) -> httpx.Request:
        return self._http.build_request(
            call.method,
            call.path,
            json=call.body,
            params=call.query,
            extensions=extensions(call, self._waiting),
        )
