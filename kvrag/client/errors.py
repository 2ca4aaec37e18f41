"""Everything the client raises on purpose.

KvragError
└── ClientError
    ├── ApiError                 the server answered with an error object
    │   ├── RefusedError         4xx: the same request will be refused again; 429 apart
    │   └── ServerError          5xx
    ├── UnreachableError         no connection, or one that broke
    │   └── TimedOutError        the server did not answer in time
    ├── UnfinishedStreamError    a stream ended early, or its answer was asked for too soon
    └── BadReplyError            what answered is no kvrag server of this API
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import httpx

from kvrag.errors import KvragError

__all__ = [
    "ApiError",
    "BadReplyError",
    "ClientError",
    "RefusedError",
    "ServerError",
    "TimedOutError",
    "UnfinishedStreamError",
    "UnreachableError",
    "translated",
]


class ClientError(KvragError):
    """Root of what the client raises."""


class ApiError(ClientError):
    """An error object of the server. `status` is None for one that came within a stream.

    code, type, param: as docs/rest.md lists them.
    """

    def __init__(
        self, message: str, *, status: int | None, code: str, type: str, param: str | None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.type, self.param = status, code, type, param


class RefusedError(ApiError):
    """The request cannot be served as it is; or not now, if `code` is `queue_full`."""


class ServerError(ApiError):
    """The server failed, or is shutting down."""


class UnreachableError(ClientError):
    """No connection to the server, or it broke."""


class TimedOutError(UnreachableError):
    """The server did not answer in time."""


class UnfinishedStreamError(ClientError):
    """The stream ended before its answer was whole, or is not at its end yet."""


class BadReplyError(ClientError):
    """A reply that this client does not understand."""


@contextmanager
def translated(url: str, closed: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn httpx's exceptions inside the block into ours, with the address named.

    closed: whether the caller has ended the connection.
    """
    try:
        yield
    except (httpx.StreamError, httpx.HTTPError) as exc:
        if closed() or isinstance(exc, httpx.StreamError):
            message = "the stream was closed before the answer was whole"
            raise UnfinishedStreamError(message) from exc
        _raise_ours(url, exc)
    except httpx.InvalidURL as exc:
        raise ClientError(f"{url} is no URL: {exc}") from exc


def _raise_ours(url: str, exc: httpx.HTTPError) -> NoReturn:
    if isinstance(exc, httpx.TimeoutException):
        raise TimedOutError(f"{url} did not answer in time ({type(exc).__name__})") from exc
    raise UnreachableError(f"{url} cannot be reached: {exc}") from exc
