"""Server-sent events: their bytes, and a response that sends a job's events as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from kvrag.answer import Answer
from kvrag.serving.disconnect import cancel_on_disconnect
from kvrag.serving.errors import problem_of
from kvrag.serving.queue import Job, JobCancelledError

__all__ = ["Event", "EventStream"]

#: Line ends to many readers of text, though not to the standard; JSON leaves them bare.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Event:
    """`data` is anything JSON holds."""

    name: str
    data: Any

    def encode(self) -> bytes:
        data = json.dumps(self.data, ensure_ascii=False).translate(_LINE_ENDS)
        # A lone surrogate, as a file's name in an error may hold one, becomes its JSON escape.
        return f"event: {self.name}\ndata: {data}\n\n".encode("utf-8", "backslashreplace")


class EventStream(Response):
    """Sends `first`, what `job` emits, its answer as `report`, and `[DONE]`.

    An error on the way is an `error` event, and the last one. A client that goes away cancels the
    job.
    """

    media_type = "text/event-stream"

    def __init__(self, first: Event, job: Job[Event, Answer]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._job = first, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        async with cancel_on_disconnect(receive, self._job):
            await send(start)
            async for chunk in self._chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _chunks(self) -> AsyncIterator[bytes]:
        yield self._first.encode()
        try:
            async for event in self._job:
                yield event.encode()
            answer = await self._job.result()
        except JobCancelledError:
            return
        except Exception as exc:
            yield Event("error", problem_of(exc).to_dict()).encode()
            return
        yield Event("report", answer.to_dict()).encode()
        yield _DONE
