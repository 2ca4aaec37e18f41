"""`POST /v1/rag/retrieve`: chunks of the corpus with handles on their KV, without an answer.

It waits for nothing that the model works on.
"""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter

from kvrag.engine import Engine
from kvrag.retrieval.catalog import StoredDocument
from kvrag.retriever import RetrievedChunk, with_documents
from kvrag.serving.schemas import (
    KVBody,
    MatchBody,
    RetrieveBody,
    Retrieved,
    RetrievedChunkBody,
    error_responses,
)

__all__ = ["retrieve_router"]

_ERRORS = error_responses(400, 413, 422, 500, 501, 503)


def retrieve_router(engine: Engine) -> APIRouter:
    """The route, as a router to be included."""
    router = APIRouter(prefix="/v1/rag", tags=["questions"])

    @router.post("/retrieve", summary="Retrieve chunks", responses=_ERRORS)
    def retrieve(body: RetrieveBody) -> Retrieved:
        """The best chunks, best first; fewer than `k` if no more are found."""
        found = engine.retrieve(body.question, **body.options())
        pairs = with_documents(found, engine.document)
        return Retrieved(chunks=[_chunk(item, document) for item, document in pairs])

    return router


def _chunk(item: RetrievedChunk, document: StoredDocument) -> RetrievedChunkBody:
    match = item.chunk.match
    return RetrievedChunkBody(
        id=item.chunk.id,
        document=document.id,
        title=item.chunk.title,
        text=item.chunk.text,
        source=document.source,
        metadata=document.metadata,
        score=item.score,
        match=None if match is None else MatchBody(**asdict(match)),
        kv=KVBody(id=str(item.handle.key), tier=item.handle.tier, state=item.handle.state),
    )
