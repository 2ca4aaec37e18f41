"""`POST /v1/rag/query` and `/chat`: a question in, an answer out, whole or as it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from kvrag.answer import Answer, Source
from kvrag.engine import Engine
from kvrag.errors import InputError, UnknownStrategyError
from kvrag.fusion import create
from kvrag.serving.disconnect import cancel_on_disconnect
from kvrag.serving.errors import InvalidOptionError
from kvrag.serving.queue import Job, ModelQueue
from kvrag.serving.schemas import AnswerBody, AskBody, ChatBody, QueryBody, error_responses
from kvrag.serving.sse import Event, EventStream
from kvrag.stream import AnswerStream

__all__ = ["query_router"]

Begin = Callable[..., AnswerStream]

_EXAMPLE = """\
event: sources
data: [{"id": "passage-0", "document": null, "title": "Karsk", "text": "Anna keeps …", …}]

event: token
data: {"text": "Anna"}

event: report
data: {"answer": "Anna", "token_ids": [48174], "finish_reason": "stop", …}

data: [DONE]

"""

_RESPONSES: dict[int | str, dict[str, Any]] = {
    HTTPStatus.OK: {
        "description": "The answer; with `stream`, as server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}, "example": _EXAMPLE}},
    },
    **error_responses(400, 413, 422, 429, 500, 501, 503, 507),
}


def query_router(engine: Engine, queue: ModelQueue) -> APIRouter:
    """The routes, as a router to be included."""
    router = APIRouter(prefix="/v1/rag", tags=["questions"])

    @router.post(
        "/query", summary="Answer a question", response_model=AnswerBody, responses=_RESPONSES
    )
    async def query(body: QueryBody, request: Request) -> Response:
        """Over the passages of the request, or over the nearest chunks of the corpus.

        With `stream`, the events are one `sources` (a list), a `token` (`{"text"}`) for each piece
        of text, one `report` (what is answered without `stream`), and `data: [DONE]`. They begin
        with the first piece, since only then it is known which tier each source came from. What
        fails before is an ordinary error response; what fails later is an `error` event with the
        error object, and the stream ends without `[DONE]`.
        """
        return await answer(body, request, partial(engine.stream, body.question))

    @router.post(
        "/chat", summary="Answer a conversation", response_model=AnswerBody, responses=_RESPONSES
    )
    async def chat(body: ChatBody, request: Request) -> Response:
        """The last message, with the others as the prompt's prefix.

        Over the passages of the request, over the `k` nearest chunks, or over neither. Answered as
        `/v1/rag/query` is.
        """
        messages = [message.model_dump() for message in body.messages]
        return await answer(body, request, partial(engine.chat, messages))

    async def answer(body: AskBody, request: Request, begin: Begin) -> Response:
        if body.strategy is not None:
            _check_strategy(body.strategy)
        job: Job[Event, Answer] = queue.submit(
            lambda job: _answer(begin(cancelled=job.cancelled, **body.options()), job)
        )
        async with cancel_on_disconnect(request.receive, job):
            if body.stream:
                return EventStream(await anext(job), job)
            return JSONResponse((await job.result()).to_dict())

    return router


def _check_strategy(strategy: str) -> None:
    """The engine would refuse it too, but only when it is this request's turn."""
    try:
        create(strategy)
    except UnknownStrategyError:
        raise
    except InputError as exc:
        raise InvalidOptionError(str(exc)) from exc


def _answer(stream: AnswerStream, job: Job[Event, Answer]) -> Answer:
    begun = False
    for piece in stream:
        if not begun:
            job.emit(_sources_event(stream.sources))
            begun = True
        job.emit(Event("token", {"text": piece}))
    if not begun:
        job.emit(_sources_event(stream.sources))
    return stream.answer


def _sources_event(sources: Sequence[Source]) -> Event:
    return Event("sources", [dataclasses.asdict(source) for source in sources])
