"""The API's routes as values: what is sent, and what comes back. Nothing is sent here.

Both clients are made of these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from kvrag.client.errors import ApiError, BadReplyError, RefusedError, ServerError
from kvrag.client.results import (
    Added,
    Answer,
    Deleted,
    Document,
    DocumentPage,
    Health,
    Retrieved,
)

__all__ = [
    "Call",
    "DocumentInput",
    "Messages",
    "Passages",
    "add",
    "api_error",
    "ask",
    "chat",
    "delete",
    "document",
    "documents",
    "health",
    "retrieve",
]

R = TypeVar("R", bound=BaseModel)

Passages = Sequence[str | Mapping[str, str]]
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[R]):
    """One request. reads: whether it may be repeated even if the server may have worked on it.

    Every call of this API may be repeated without harm; but work that takes long should not be
    done twice because its answer was lost.
    """

    method: str
    path: str
    reply: type[R]
    reads: bool = False
    body: Mapping[str, Any] | None = None
    query: Mapping[str, Any] | None = None

    def result(self, response: httpx.Response) -> R:
        """What a finished response holds.

        Raises:
            ApiError: the server refused or failed.
            BadReplyError: the response is none of this API's.
        """
        if response.status_code != 200:
            raise api_error(response)
        try:
            return self.reply.model_validate_json(response.content)
        except ValidationError as exc:
            raise BadReplyError(
                f"{self.method} {self.path} was answered with what is no {self.reply.__name__}: "
                f"{exc.errors(include_url=False, include_input=False)[0]['msg']}"
            ) from exc


@dataclass(frozen=True, slots=True)
class DocumentInput:
    """A document to be added. id: None lets it follow from title and text."""

    text: str
    title: str = ""
    source: str = ""
    metadata: Mapping[str, Any] | None = None
    id: str | None = None


def ask(question: str, **options: Any) -> Call[Answer]:
    return _answered("/v1/rag/query", {"question": question}, options)


def chat(messages: Messages, **options: Any) -> Call[Answer]:
    return _answered("/v1/rag/chat", {"messages": list(messages)}, options)


def retrieve(question: str, **options: Any) -> Call[Retrieved]:
    body = {"question": question} | options
    return Call(
        method="POST", path="/v1/rag/retrieve", reply=Retrieved, reads=True, body=_given(body)
    )


def add(documents: Iterable[DocumentInput]) -> Call[Added]:
    body = {"documents": [_given(asdict(document)) for document in documents]}
    return Call(method="POST", path="/v1/documents", reply=Added, body=body)


def documents(*, limit: int, offset: int) -> Call[DocumentPage]:
    query = {"limit": limit, "offset": offset}
    return Call(method="GET", path="/v1/documents", reply=DocumentPage, reads=True, query=query)


def document(id: str) -> Call[Document]:
    return Call(method="GET", path=_document_path(id), reply=Document, reads=True)


def delete(id: str) -> Call[Deleted]:
    return Call(method="DELETE", path=_document_path(id), reply=Deleted)


def health() -> Call[Health]:
    return Call(method="GET", path="/health", reply=Health, reads=True)


def api_error(response: httpx.Response) -> ApiError | BadReplyError:
    """The error of a response whose body was read."""
    try:
        error = response.json()["error"]
        kind = ServerError if response.status_code >= 500 else RefusedError
        return kind(
            str(error["message"]),
            status=response.status_code,
            code=str(error["code"]),
            type=str(error["type"]),
            param=error["param"],
        )
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError):
        return BadReplyError(
            f"{response.request.url} answered with status {response.status_code} and no error "
            "object; is it a kvrag server?"
        )


def _answered(path: str, asked: dict[str, Any], options: Mapping[str, Any]) -> Call[Answer]:
    return Call(method="POST", path=path, reply=Answer, body=asked | _given(options))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, which the server fills in."""
    return {name: value for name, value in options.items() if value is not None}


def _document_path(id: str) -> str:
    return f"/v1/documents/{quote(id, safe='')}"
