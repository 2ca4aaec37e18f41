"""`KVRagRetriever`: chunks of a corpus as LangChain documents."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field, PrivateAttr

from kvrag.client import RetrievedChunk
from kvrag.integrations.backend import Backend, backend_of

__all__ = ["KVRagRetriever"]


class KVRagRetriever(BaseRetriever):
    """The best chunks first; none from an empty corpus.

    A document's metadata is its own, with `source` and `title` where it has none of these, and
    `document_id`, `score`, `kv_id` and `kv_tier`: an opaque id of the chunk's KV, and the fastest
    tier that holds it, None for none.
    """

    source: Any = Field(exclude=True, repr=False)
    """An `Engine`, or the URL of a server."""
    k: int | None = None
    """Chunks to retrieve; None is the engine's setting. `invoke(question, k=…)` overrides it."""
    search: str | None = None
    """`hybrid`, `dense` or `lexical`; None is the engine's setting, as for `mmr`,
    `distinct` and `rerank`."""
    where: dict[str, Any] | None = None
    """Filter over the documents' metadata, see docs/retrieval.md."""
    mmr: float | None = None
    distinct: float | None = None
    rerank: str | None = None
    prefetch: bool = False
    """Whether to load the chunks' KV at once, for a question that follows."""

    _backend: Backend = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        self._backend = backend_of(self.source)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = self._backend.retrieve(query, k or self.k, **self._options())
        return [_document(chunk) for chunk in found]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = await self._backend.aretrieve(query, k or self.k, **self._options())
        return [_document(chunk) for chunk in found]

    def _options(self) -> dict[str, Any]:
        names = ("search", "where", "mmr", "distinct", "rerank", "prefetch")
        return {name: getattr(self, name) for name in names}


def _document(chunk: RetrievedChunk) -> Document:
    metadata = {"source": chunk.source, "title": chunk.title} | (chunk.metadata or {})
    return Document(
        id=chunk.id,
        page_content=chunk.text,
        metadata=metadata
        | {
            "document_id": chunk.document,
            "score": chunk.score,
            "kv_id": chunk.kv.id,
            "kv_tier": chunk.kv.tier,
        },
    )
