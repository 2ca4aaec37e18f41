"""What stands around the whole application: a bound on bodies, and quiet when the server stops."""

from __future__ import annotations

import asyncio

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard"]


class Guard:
    """ASGI middleware. A body of more than `max_body_bytes` is 413 as soon as that is known."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._limit = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, self._bounded(scope, receive), send)
        except asyncio.CancelledError:
            # The server gives up on a client that does not read; nothing is left to be sent.
            return

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        declared = Headers(scope=scope).get("content-length", "")
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            if declared.isdecimal() and int(declared[:20]) > self._limit:
                raise self._too_large()
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._limit:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> HTTPException:
        # The connection stays: the server reads the rest and drops it. Closed at once, a client
        # that still sends would see a reset instead of this answer.
        return HTTPException(413, f"the body is larger than {self._limit} bytes")
