"""How the clients connect, wait and repeat."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Any

import httpx
from httpx_retries import Retry

from kvrag.client.calls import Call
from kvrag.errors import InputError

__all__ = ["Waiting", "extensions", "tls"]

_METHODS = ("GET", "POST", "DELETE")
#: The server did not begin to work on the request.
_NOT_BEGUN = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_LOST = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_FIRST_WAIT_S = 0.25


@dataclass(frozen=True, slots=True)
class Waiting:
    """Bounds on waiting, in seconds.

    timeout_s: for the next byte of an answer. retries: repetitions of a request that may be
    repeated. longest_wait_s: before one of them, whatever Retry-After says.
    """

    timeout_s: float = 60.0
    connect_timeout_s: float = 5.0
    retries: int = 3
    longest_wait_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("timeout_s", "connect_timeout_s", "longest_wait_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be above 0")
        if self.retries < 0:
            raise InputError(f"retries is {self.retries!r}; it must be 0 or more")

    @property
    def timeout(self) -> httpx.Timeout:
        return httpx.Timeout(self.timeout_s, connect=self.connect_timeout_s)

    def retry(self, *, reads: bool = False) -> Retry:
        """What is repeated. 429 and 503 come before the work; Retry-After is obeyed."""
        return Retry(
            total=self.retries,
            allowed_methods=_METHODS,
            status_forcelist=(429, 502, 503, 504) if reads else (429, 503),
            retry_on_exceptions=_LOST if reads else _NOT_BEGUN,
            backoff_factor=_FIRST_WAIT_S,
            max_backoff_wait=self.longest_wait_s,
        )


def extensions(call: Call[Any], waiting: Waiting) -> dict[str, Any]:
    """Of a request: whether a lost answer makes it be repeated."""
    return {"retry": waiting.retry(reads=call.reads)}


def tls(url: str) -> ssl.SSLContext | bool:
    """What `verify` is for a URL: True, or for plain HTTP a context that trusts nobody.

    Reading the system's certificates takes longer than most requests.
    """
    return True if url.startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
