"""From exceptions to the error object `{"error": {"message", "type", "param", "code"}}`.

A message is a sentence that was written for the caller. What nobody foresaw is logged here and
answered without details.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from kvrag.errors import (
    BusyError,
    ClosedError,
    EmptyCorpusError,
    InputError,
    KvragError,
    MissingExtraError,
    NothingFoundError,
    PromptTooLongError,
    UnknownStrategyError,
)
from kvrag.precompute.job import StorageFullError
from kvrag.retrieval.errors import DocumentError, RetrievalError
from kvrag.retrieval.errors import MissingExtraError as RetrievalExtraError
from kvrag.serving.queue import JobCancelledError
from kvrag.store.errors import StoreError

__all__ = [
    "InvalidDocumentError",
    "InvalidOptionError",
    "Problem",
    "UnknownDocumentError",
    "problem_of",
]

_LOG = logging.getLogger(__name__)
_RETRY_AFTER_S = 1
#: nginx's word for a client that went away; nobody reads it.
_CLIENT_GONE = 499
#: Complaints shown for one body; a hostile one may hold thousands.
_MOST_COMPLAINTS = 5


class InvalidDocumentError(InputError):
    """A document that cannot be stored. `param` is its place in the request."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class InvalidOptionError(InputError):
    """A strategy that is known, with options that are not allowed."""


class UnknownDocumentError(KvragError):
    """No document has the id."""

    def __init__(self, document_id: str) -> None:
        super().__init__(f"no document has the id {document_id[:100]!r}")


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as a client sees it. param: the field, with dots and indices; None if none is."""

    status: int
    message: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] | None = None

    @property
    def type(self) -> str:
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def to_dict(self) -> dict[str, dict[str, str | None]]:
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        return Response(
            json.dumps(self.to_dict()),
            status_code=self.status,
            headers=dict(self.headers or {}),
            media_type="application/json",
        )


#: The first that fits counts: (type, status, code, param).
_KNOWN: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (BusyError, 429, "queue_full", None),
    (ClosedError, 503, "shutting_down", None),
    (JobCancelledError, _CLIENT_GONE, "cancelled", None),
    (UnknownDocumentError, 404, "unknown_document", "id"),
    (EmptyCorpusError, 400, "empty_corpus", "passages"),
    (NothingFoundError, 400, "nothing_found", "question"),
    (UnknownStrategyError, 400, "unknown_strategy", "strategy"),
    (PromptTooLongError, 400, "too_long", None),
    (InvalidDocumentError, 400, "invalid_document", None),
    (InvalidOptionError, 400, "invalid_value", "strategy"),
    (InputError, 400, "invalid_value", None),
    (DocumentError, 400, "invalid_document", None),
    (MissingExtraError, 501, "missing_extra", None),
    (RetrievalExtraError, 501, "missing_extra", None),
    (StorageFullError, 507, "storage_full", None),
    (KvragError, 500, "engine_error", None),
    (RetrievalError, 500, "retrieval_error", None),
    (StoreError, 500, "store_error", None),
)


def problem_of(exc: BaseException) -> Problem:
    """What a client is told about `exc`; failures of ours are logged."""
    if isinstance(exc, RequestValidationError):
        return _validation_problem(exc.errors())
    if isinstance(exc, HTTPException):
        return _http_problem(exc)
    for kind, status, code, param in _KNOWN:
        if isinstance(exc, kind):
            if status >= 500 and kind is not ClosedError:
                _LOG.error("a request failed: %s", exc)
            wait = {"Retry-After": str(_RETRY_AFTER_S)} if status == 429 else None
            return Problem(status, str(exc), code, getattr(exc, "param", param), wait)
    _LOG.error("a request failed in a way nobody foresaw: %r", exc, exc_info=exc)
    return Problem(500, "internal error; the server's log has the details", "internal_error")


def _http_problem(exc: HTTPException) -> Problem:
    messages = {
        400: ("the body could not be read as JSON", "invalid_json"),
        404: ("there is no such route; /docs lists them", "unknown_route"),
        405: ("this route does not know that method", "unknown_method"),
        413: (str(exc.detail), "too_large"),
    }
    message, code = messages.get(exc.status_code, (str(exc.detail), "http_error"))
    return Problem(exc.status_code, message, code, headers=exc.headers)


def _validation_problem(errors: Sequence[Mapping[str, Any]]) -> Problem:
    first = errors[0]
    if first["type"] == "json_invalid":
        return Problem(400, f"the body is not JSON: {first['ctx']['error']}", "invalid_json")
    if tuple(first["loc"]) == ("body",) and first["type"] != "unknown_field":
        return Problem(
            422,
            "the body must be a JSON object, sent with the content type application/json",
            "invalid_body",
        )
    clauses = []
    for error in errors[:_MOST_COMPLAINTS]:
        param, text = _param(error), str(error["msg"])
        text = text[:1].lower() + text[1:]
        clauses.append(f"{param}: {text}" if param else text)
    code = "unknown_field" if first["type"] == "unknown_field" else "invalid_value"
    return Problem(422, "; ".join(clauses), code, _param(first))


def _param(error: Mapping[str, Any]) -> str | None:
    # The first part is where the value came from (body, query, path); a tag in angle brackets is a
    # branch of a union and nothing that the caller wrote.
    parts = [str(part) for part in error["loc"][1:] if not str(part).startswith("<")]
    if error["type"] == "unknown_field":
        parts.append(error["ctx"]["field"])
    return ".".join(parts) or None
