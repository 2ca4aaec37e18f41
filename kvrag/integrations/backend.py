"""One face for adapters over an engine of this process and over a server's URL.

Results are the client's either way. Over an engine, coroutines run in worker threads, so that the
event loop never waits for the model; over a URL they are coroutines all the way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrag.client import (
    Answer,
    AsyncKVRagClient,
    Document,
    DocumentInput,
    KVHandle,
    KVRagClient,
    Match,
    RefusedError,
    RetrievedChunk,
)
from kvrag.client.calls import Messages
from kvrag.errors import EmptyCorpusError, InputError

if TYPE_CHECKING:
    from kvrag.engine import Engine
    from kvrag.prefill import ContextChunk
    from kvrag.searching import Search

__all__ = ["Backend", "EngineBackend", "ServerBackend", "backend_of"]


#: Options of a request that are one `Search` to the engine.
_SEARCH = ("search", "where", "mmr", "distinct", "rerank")


class Backend(ABC):
    """What adapters need. An empty corpus holds no chunks, which is no error here."""

    #: What the model is called, if that is known without asking.
    known_model_name: str | None = None

    @abstractmethod
    def model_name(self) -> str: ...
    @abstractmethod
    async def amodel_name(self) -> str: ...
    @abstractmethod
    def retrieve(
        self, question: str, k: int | None, *, prefetch: bool, **search: Any
    ) -> list[RetrievedChunk]:
        """search: `search`, `where`, `mmr`, `distinct` and `rerank`, as requests have them."""

    @abstractmethod
    async def aretrieve(
        self, question: str, k: int | None, *, prefetch: bool, **search: Any
    ) -> list[RetrievedChunk]: ...
    @abstractmethod
    def chat(self, messages: Messages, **options: Any) -> Generator[str | Answer, None, None]:
        """Pieces of text, and the answer at the end. Closing the iterator ends the work."""

    @abstractmethod
    def achat(self, messages: Messages, **options: Any) -> AsyncGenerator[str | Answer, None]:
        """As `chat`."""

    @abstractmethod
    def add(self, documents: Sequence[DocumentInput]) -> list[str]:
        """Their ids."""

    @abstractmethod
    async def aadd(self, documents: Sequence[DocumentInput]) -> list[str]: ...
    @abstractmethod
    def document(self, id: str) -> Document | None: ...
    @abstractmethod
    async def adocument(self, id: str) -> Document | None: ...
    @abstractmethod
    def delete(self, id: str) -> bool: ...
    @abstractmethod
    async def adelete(self, id: str) -> bool: ...

    #: Releases connections. An engine belongs to its caller.
    close: Callable[[], object]


def backend_of(source: Engine | str, **client: Any) -> Backend:
    """`source`: an engine, or the URL of a server; `client`: options of `KVRagClient`.

    Raises:
        InputError: it is neither.
    """
    if isinstance(source, str):
        return ServerBackend(source, **client)
    from kvrag.engine import Engine

    if not isinstance(source, Engine):
        raise InputError(f"the source is {type(source).__name__}; give an Engine or a URL")
    return EngineBackend(source)


class EngineBackend(Backend):
    """An engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.close = lambda: None
        self.known_model_name = Path(engine.settings.model).name

    def model_name(self) -> str:
        return str(self.known_model_name)

    async def amodel_name(self) -> str:
        return self.model_name()

    def retrieve(
        self, question: str, k: int | None, *, prefetch: bool, **search: Any
    ) -> list[RetrievedChunk]:
        from kvrag.retriever import with_documents  # brings torch, as an engine does and no URL

        try:
            found = self.engine.retrieve(question, k=k, prefetch=prefetch, search=_search(search))
        except EmptyCorpusError:
            return []
        return [
            RetrievedChunk(
                id=item.chunk.id,
                document=document.id,
                title=item.chunk.title,
                text=item.chunk.text,
                source=document.source,
                metadata=document.metadata,
                score=item.score,
                match=_match(item.chunk),
                kv=KVHandle(
                    id=str(item.handle.key), tier=item.handle.tier, state=item.handle.state
                ),
            )
            for item, document in with_documents(found, self.engine.document)
        ]

    async def aretrieve(
        self, question: str, k: int | None, *, prefetch: bool, **search: Any
    ) -> list[RetrievedChunk]:
        return await asyncio.to_thread(self.retrieve, question, k, prefetch=prefetch, **search)

    def chat(self, messages: Messages, **options: Any) -> Generator[str | Answer, None, None]:
        chosen = {name: options.pop(name) for name in _SEARCH if name in options}
        stream = self.engine.chat(messages, search=_search(chosen), **options)
        yield from stream
        yield Answer.model_validate(stream.answer.to_dict(), from_attributes=True)

    async def achat(self, messages: Messages, **options: Any) -> AsyncGenerator[str | Answer, None]:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | Answer | BaseException | None] = asyncio.Queue()
        left = threading.Event()

        def run() -> None:
            end: BaseException | None = None
            try:
                for piece in self.chat(messages, cancelled=left.is_set, **options):
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)
            except BaseException as exc:  # whoever awaits gets it
                end = exc
            loop.call_soon_threadsafe(pieces.put_nowait, end)

        work = asyncio.ensure_future(asyncio.to_thread(run))
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            # The thread ends at the next token, and not later than the loop.
            left.set()
            await asyncio.shield(work)

    def add(self, documents: Sequence[DocumentInput]) -> list[str]:
        from kvrag.retrieval.documents import Document as Added

        added = [
            Added(
                document.text,
                document.title,
                document.source,
                None if document.metadata is None else dict(document.metadata),
                id=document.id or "",
            )
            for document in documents
        ]
        self.engine.add(added)
        return [document.id for document in added]

    async def aadd(self, documents: Sequence[DocumentInput]) -> list[str]:
        return await asyncio.to_thread(self.add, documents)

    def document(self, id: str) -> Document | None:
        stored = self.engine.document(id)
        if stored is None:
            return None
        text = self.engine.document_text(id)
        return Document.model_validate(dataclasses.asdict(stored) | {"text": text})

    async def adocument(self, id: str) -> Document | None:
        return await asyncio.to_thread(self.document, id)

    def delete(self, id: str) -> bool:
        return self.engine.delete(id)

    async def adelete(self, id: str) -> bool:
        return await asyncio.to_thread(self.delete, id)


def _search(given: dict[str, Any]) -> Search | None:
    from kvrag.searching import Search

    if all(value is None for value in given.values()):
        return None
    return Search(*(given.get(name) for name in _SEARCH))


def _match(chunk: ContextChunk) -> Match | None:
    return None if chunk.match is None else Match(**dataclasses.asdict(chunk.match))


class ServerBackend(Backend):
    """A server. Each coroutine opens a connection of its own, since a pool belongs to one loop."""

    def __init__(self, url: str, **options: Any) -> None:
        self.url, self._options = url, options
        self._client = KVRagClient(url, **options)
        # Adapters are values, which nobody closes.
        self.close = weakref.finalize(self, self._client.close)

    def model_name(self) -> str:
        if self.known_model_name is None:
            self.known_model_name = self._client.health().model
        return self.known_model_name

    async def amodel_name(self) -> str:
        if self.known_model_name is None:
            async with self._opened() as client:
                self.known_model_name = (await client.health()).model
        return self.known_model_name

    def retrieve(
        self, question: str, k: int | None, *, prefetch: bool, **search: Any
    ) -> list[RetrievedChunk]:
        try:
            return self._client.retrieve(question, k=k, prefetch=prefetch, **search)
        except RefusedError as exc:
            return _nothing(exc)

    async def aretrieve(
        self, question: str, k: int | None, *, prefetch: bool, **search: Any
    ) -> list[RetrievedChunk]:
        async with self._opened() as client:
            try:
                return await client.retrieve(question, k=k, prefetch=prefetch, **search)
            except RefusedError as exc:
                return _nothing(exc)

    def chat(self, messages: Messages, **options: Any) -> Generator[str | Answer, None, None]:
        with closing(self._client.stream_chat(messages, **options)) as stream:
            yield from stream
            yield stream.answer

    async def achat(self, messages: Messages, **options: Any) -> AsyncGenerator[str | Answer, None]:
        async with (
            self._opened() as client,
            aclosing(await client.stream_chat(messages, **options)) as stream,
        ):
            async for piece in stream:
                yield piece
            yield stream.answer

    def add(self, documents: Sequence[DocumentInput]) -> list[str]:
        return self._client.add(*documents).ids

    async def aadd(self, documents: Sequence[DocumentInput]) -> list[str]:
        async with self._opened() as client:
            return (await client.add(*documents)).ids

    def document(self, id: str) -> Document | None:
        return self._client.document(id)

    async def adocument(self, id: str) -> Document | None:
        async with self._opened() as client:
            return await client.document(id)

    def delete(self, id: str) -> bool:
        return self._client.delete(id)

    async def adelete(self, id: str) -> bool:
        async with self._opened() as client:
            return await client.delete(id)

    def _opened(self) -> AsyncKVRagClient:
        return AsyncKVRagClient(self.url, **self._options)


def _nothing(exc: RefusedError) -> list[RetrievedChunk]:
    if exc.code != "empty_corpus":
        raise exc
    return []
