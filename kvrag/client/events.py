"""The events of a streamed answer, put together. Knows nothing of connections."""

from __future__ import annotations

import json
from typing import Any

from httpx_sse import ServerSentEvent
from pydantic import TypeAdapter, ValidationError

from kvrag.client.errors import (
    ApiError,
    BadReplyError,
    RefusedError,
    ServerError,
    UnfinishedStreamError,
)
from kvrag.client.results import Answer, Source

__all__ = ["AnswerEvents"]

_SOURCES = TypeAdapter(list[Source])


class AnswerEvents:
    """`take` each event in order; `finish` says whether the answer is whole."""

    def __init__(self) -> None:
        #: There from the first piece on.
        self.sources: list[Source] = []
        self.done = False
        self._answer: Answer | None = None

    def take(self, event: ServerSentEvent) -> str:
        """The text that an event brings; empty for others than `token`.

        Raises:
            ApiError: the event is an error.
            BadReplyError: it cannot be read.
        """
        if event.data == "[DONE]":
            self.done = True
            return ""
        try:
            data = json.loads(event.data)
            match event.event:
                case "token":
                    return str(data["text"])
                case "sources":
                    self.sources = _SOURCES.validate_python(data)
                case "report":
                    self._answer = Answer.model_validate(data)
                    self.sources = self._answer.sources
                case "error":
                    raise _error(data["error"])
        except (ValueError, LookupError, TypeError, ValidationError) as exc:
            raise BadReplyError(f"the stream has an event {event.event!r} that is broken") from exc
        return ""

    def finish(self) -> None:
        """Raises UnfinishedStreamError if the connection ended before the answer."""
        if not self.done or self._answer is None:
            raise UnfinishedStreamError("the connection ended before the answer was whole")

    @property
    def answer(self) -> Answer:
        if self._answer is None:
            raise UnfinishedStreamError("the answer is not finished; iterate over the stream first")
        return self._answer


def _error(error: dict[str, Any]) -> ApiError:
    kind = ServerError if error["type"] == "server_error" else RefusedError
    return kind(
        error["message"],
        status=None,
        code=error["code"],
        type=error["type"],
        param=error["param"],
    )
