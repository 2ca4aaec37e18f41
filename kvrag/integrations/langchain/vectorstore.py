"""`KVRagVectorStore`: a corpus as a vector store; what is added gets its KV at once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from kvrag.client import Document as StoredDocument
from kvrag.client import DocumentInput, RetrievedChunk
from kvrag.config import Settings
from kvrag.errors import InputError
from kvrag.integrations.backend import Backend, EngineBackend, backend_of
from kvrag.integrations.langchain.embedder import LangChainEmbedder

__all__ = ["KVRagVectorStore"]

#: Documents in one request.
_BATCH = 100


class KVRagVectorStore(VectorStore):
    """Documents by id over an engine, the settings of one, or a server's URL.

    A document with more tokens than a chunk holds is found in parts: a result's text is its
    chunk's, its id and metadata are the document's. `title` in the metadata, a text, stands above
    each of them in prompts. Metadata is JSON.

    Args:
        source: an `Engine`, a URL, or `Settings`, with which an engine is opened that `close` ends.
        embedding: what the corpus is searched with instead of the engine's own embedder. With an
            `Engine`, the one that it was opened with: `Engine.open(settings,
            embedder=LangChainEmbedder(embedding))`. A server has an embedder of its own.

    Raises:
        InputError: the source has another embedder.
    """

    def __init__(self, source: Any, embedding: Embeddings | None = None) -> None:
        self._embedding = embedding
        self._close: Callable[[], object]
        if isinstance(source, Settings):
            from kvrag.engine import Engine

            embedder = None if embedding is None else LangChainEmbedder(embedding)
            engine = Engine.open(source, embedder=embedder)
            self._backend: Backend = EngineBackend(engine)
            self._close = engine.close
            return
        self._backend = backend_of(source)
        self._close = self._backend.close
        if embedding is not None:
            try:
                _check_embedder(self._backend, embedding)
            except InputError:
                self.close()
                raise

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        source: Any = None,
        **kwargs: Any,
    ) -> Self:
        """A store over `source`, with `texts` added to it."""
        store = cls(source, embedding)
        store.add_texts(texts, metadatas, ids=ids, **kwargs)
        return store

    @property
    def embeddings(self) -> Embeddings | None:
        return self._embedding

    def close(self) -> None:
        """Close what this store opened."""
        self._close()

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Add texts, compute their KV, and return their ids; what has an id already is replaced."""
        added: list[str] = []
        documents = iter(_inputs(texts, metadatas, ids))
        while batch := list(islice(documents, _BATCH)):
            added += self._backend.add(batch)
        return added

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        added: list[str] = []
        documents = iter(_inputs(texts, metadatas, ids))
        while batch := list(islice(documents, _BATCH)):
            added += await self._backend.aadd(batch)
        return added

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents with their vectors and KV; ids that are absent are no error."""
        for id in _some(ids):
            self._backend.delete(id)
        return True

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        for id in _some(ids):
            await self._backend.adelete(id)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Whole documents in the order of `ids`, without those that are absent."""
        found = [self._backend.document(id) for id in ids]
        return [_whole(stored) for stored in found if stored is not None]

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        found = await asyncio.gather(*(self._backend.adocument(id) for id in ids))
        return [_whole(stored) for stored in found if stored is not None]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        found = await self.asimilarity_search_with_score(query, k, **kwargs)
        return [document for document, _ in found]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """With cosine similarities, the highest first. filter: over metadata, docs/retrieval.md."""
        found = self._backend.retrieve(query, k, prefetch=False, search="dense", where=filter)
        return [(_part(chunk), chunk.score) for chunk in found]

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, *, filter: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        found = await self._backend.aretrieve(
            query, k, prefetch=False, search="dense", where=filter
        )
        return [(_part(chunk), chunk.score) for chunk in found]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: (cosine + 1) / 2


def _check_embedder(backend: Backend, embedding: Embeddings) -> None:
    used = backend.engine.embedder if isinstance(backend, EngineBackend) else None
    if used is None:
        raise InputError("a server has an embedder of its own; leave embedding out")
    if not isinstance(used, LangChainEmbedder) or used.embeddings is not embedding:
        raise InputError(
            "the engine was not opened with this embedding; open it with "
            "Engine.open(settings, embedder=LangChainEmbedder(embedding))"
        )


def _inputs(
    texts: Iterable[str],
    metadatas: Sequence[dict[str, Any]] | None,
    ids: Sequence[str | None] | None,
) -> list[DocumentInput]:
    texts = list(texts)
    for name, values in (("metadatas", metadatas), ("ids", ids)):
        if values is not None and len(values) != len(texts):
            raise InputError(f"there are {len(texts)} texts and {len(values)} {name}")
    inputs = []
    for index, text in enumerate(texts):
        metadata = metadatas[index] if metadatas else {}
        title = metadata.get("title", "")
        inputs.append(
            DocumentInput(
                text,
                title=title if isinstance(title, str) else "",
                metadata=metadata,
                id=(ids[index] if ids else None) or str(uuid.uuid4()),
            )
        )
    return inputs


def _some(ids: list[str] | None) -> list[str]:
    if ids is None:
        raise InputError("give the ids to delete; nothing deletes a whole corpus by default")
    return ids


def _part(chunk: RetrievedChunk) -> Document:
    return Document(id=chunk.document, page_content=chunk.text, metadata=chunk.metadata or {})


def _whole(stored: StoredDocument) -> Document:
    return Document(id=stored.id, page_content=stored.text or "", metadata=stored.metadata or {})
