"""What stands around the whole application.

Whom it answers, a bound on bodies, and quiet when the server stops.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrag.serving.errors import Problem

__all__ = ["Guard"]

#: The Host header: an IPv6 address in brackets, or anything else; then perhaps a port.
_HOST = re.compile(r"(?:\[(?P<ipv6>[^\[\]]*)\]|(?P<name>[^\[\]:]*))(?::[0-9]*)?")


class Guard:
    """ASGI middleware.

    A request to another host than this machine's loopback is 400: without API keys, a page whose
    own name was made to lead here (DNS rebinding) must not read the corpus through somebody's
    browser. A body of more than `max_body_bytes` is 413 as soon as that is known.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._limit = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = Headers(scope=scope).get("host", "")
        if not _is_loopback(host):
            # Outside of the application's own handlers, which would turn an exception into this.
            await _foreign_host(host).response()(scope, receive, send)
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


def _is_loopback(host: str) -> bool:
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match["name"] if match["ipv6"] is None else match["ipv6"]
    if match["ipv6"] is None and name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback and (address.version == 6) == (match["ipv6"] is not None)


def _foreign_host(host: str) -> Problem:
    return Problem(
        400,
        f"the Host header is {host[:100]!r}; only this machine is served: address it as "
        "127.0.0.1, localhost or [::1]",
        "foreign_host",
    )
