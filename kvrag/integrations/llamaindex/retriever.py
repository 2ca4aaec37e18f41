"""`KVRagRetriever`: chunks of a corpus as LlamaIndex nodes."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import (
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)

from kvrag.client import RetrievedChunk
from kvrag.integrations.backend import backend_of

__all__ = ["KVRagRetriever"]

_HANDLE = ("kv_id", "kv_tier")


class KVRagRetriever(BaseRetriever):
    """The nearest chunks, best first; none from an empty corpus.

    Metadata is the document's, with `source` and `title` where it has none of these, and the
    handle: `kv_id`, an opaque id of the chunk's KV, and `kv_tier`, the fastest tier that holds it.
    The handle reaches neither a prompt nor an embedding.

    Args:
        source: an `Engine`, or the URL of a server.
        k: chunks to retrieve; None is the engine's setting.
        search, where, mmr, distinct, rerank: how they are found, see docs/retrieval.md; None is
            the engine's setting.
        prefetch: whether to load the chunks' KV at once.
        client: options of `KVRagClient`, over a URL.
    """

    def __init__(
        self,
        source: Any,
        *,
        k: int | None = None,
        search: str | None = None,
        where: dict[str, Any] | None = None,
        mmr: float | None = None,
        distinct: float | None = None,
        rerank: str | None = None,
        prefetch: bool = False,
        callback_manager: CallbackManager | None = None,
        **client: Any,
    ) -> None:
        self._backend = backend_of(source, **client)
        self._k = k
        self._options: dict[str, Any] = {
            "search": search,
            "where": where,
            "mmr": mmr,
            "distinct": distinct,
            "rerank": rerank,
            "prefetch": prefetch,
        }
        super().__init__(callback_manager=callback_manager)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        question = query_bundle.query_str
        return _nodes(self._backend.retrieve(question, self._k, **self._options))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        question = query_bundle.query_str
        return _nodes(await self._backend.aretrieve(question, self._k, **self._options))


def _nodes(chunks: list[RetrievedChunk]) -> list[NodeWithScore]:
    return [NodeWithScore(node=_node(chunk), score=chunk.score) for chunk in chunks]


def _node(chunk: RetrievedChunk) -> TextNode:
    metadata = {"source": chunk.source, "title": chunk.title} | (chunk.metadata or {})
    return TextNode(
        id_=chunk.id,
        text=chunk.text,
        metadata=metadata | {"kv_id": chunk.kv.id, "kv_tier": chunk.kv.tier},
        excluded_llm_metadata_keys=list(_HANDLE),
        excluded_embed_metadata_keys=list(_HANDLE),
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=chunk.document)},
    )
