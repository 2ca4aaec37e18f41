"""`/v1/documents`: add, list, show and delete the documents of the corpus.

Adding and deleting wait for the model, so that each question sees the corpus as it was when its
turn came. Listing and showing wait for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request

from kvrag.engine import Engine
from kvrag.retrieval.catalog import StoredDocument
from kvrag.retrieval.documents import Document
from kvrag.retrieval.errors import DocumentError
from kvrag.serving.disconnect import cancel_on_disconnect
from kvrag.serving.errors import InvalidDocumentError, UnknownDocumentError
from kvrag.serving.queue import Job, JobCancelledError, ModelQueue
from kvrag.serving.schemas import (
    AddBody,
    Added,
    AddReport,
    Deleted,
    DocumentBody,
    DocumentList,
    DocumentPage,
    PageQuery,
    ShownDocumentBody,
    StoredDocumentBody,
    error_responses,
)

__all__ = ["documents_router"]

_ADD_ERRORS = error_responses(400, 413, 422, 429, 500, 501, 503, 507)
_READ_ERRORS = error_responses(400, 422, 500, 503)
_SHOW_ERRORS = error_responses(400, 404, 422, 500, 503)
_DELETE_ERRORS = error_responses(400, 404, 422, 429, 500, 503)


def documents_router(engine: Engine, queue: ModelQueue) -> APIRouter:
    """The routes, as a router to be included."""
    router = APIRouter(prefix="/v1/documents", tags=["documents"])

    @router.post("", summary="Add documents", responses=_ADD_ERRORS)
    async def add(body: AddBody, request: Request) -> Added:
        """One document, or several under `documents`.

        A document that is there already changes nothing, but for KV that it still lacks. One with
        an `id` replaces what has that id. If the client goes away, what was stored stays, and
        adding the same again does the rest.
        """
        documents = _documents(body)
        job: Job[None, Added] = queue.submit(lambda job: _add(engine, documents, job))
        async with cancel_on_disconnect(request.receive, job):
            return await job.result()

    @router.get("", summary="List documents", responses=_READ_ERRORS)
    def page(query: Annotated[PageQuery, Query()]) -> DocumentPage:
        """In the order in which they were added."""
        found = engine.documents(limit=query.limit, offset=query.offset)
        return DocumentPage(
            documents=[_stored(document) for document in found],
            limit=query.limit,
            offset=query.offset,
        )

    # A given id may hold slashes.
    @router.get("/{id:path}", summary="Show a document", responses=_SHOW_ERRORS)
    def show(id: str) -> ShownDocumentBody:
        """With its text, if it was added with an id of its own."""
        _check_given(id)
        document = engine.document(id)
        if document is None:
            raise UnknownDocumentError(id)
        return ShownDocumentBody(
            **_stored(document).model_dump(), text=engine.document_text(document.id)
        )

    @router.delete("/{id:path}", summary="Delete a document", responses=_DELETE_ERRORS)
    async def delete(id: str, request: Request) -> Deleted:
        """With its vectors, and the KV that no other document shares."""
        _check_given(id)
        job: Job[None, bool] = queue.submit(lambda job: engine.delete(id))
        async with cancel_on_disconnect(request.receive, job):
            if not await job.result():
                raise UnknownDocumentError(id)
            return Deleted(id=id, deleted=True)

    return router


def _check_given(id: str) -> None:
    if not id:  # `path` matches that, too
        raise HTTPException(404)


def _documents(body: DocumentBody | DocumentList) -> list[Document]:
    many = isinstance(body, DocumentList)
    documents = []
    for index, item in enumerate(body.documents if isinstance(body, DocumentList) else [body]):
        try:
            documents.append(_document(item))
        except DocumentError as exc:
            raise InvalidDocumentError(str(exc), f"documents.{index}" if many else None) from exc
    return documents


def _document(body: DocumentBody) -> Document:
    return Document(body.text, body.title, body.source, body.metadata, id=body.id or "")


def _add(engine: Engine, documents: Sequence[Document], job: Job[None, Added]) -> Added:
    progress = engine.add(documents, cancelled=job.cancelled)
    if progress.cancelled:
        raise JobCancelledError("the request was cancelled")
    return Added(
        ids=[document.id for document in documents],
        new=progress.documents_added,
        known=progress.documents_known,
        chunks=progress.chunks_done,
        report=AddReport(
            chunks_computed=progress.chunks_done - progress.chunks_stored_before,
            chunks_stored_before=progress.chunks_stored_before,
            tokens_computed=progress.tokens_computed,
            bytes_written=progress.bytes_written,
            seconds=progress.seconds,
        ),
    )


def _stored(document: StoredDocument) -> StoredDocumentBody:
    return StoredDocumentBody(
        id=document.id,
        title=document.title,
        source=document.source,
        metadata=document.metadata,
        added_at=document.added_at,
        num_chunks=document.num_chunks,
    )
