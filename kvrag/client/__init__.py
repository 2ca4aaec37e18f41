"""A typed client of kvrag's REST API. Needs the `client` extra, and neither torch nor the engine.

    with KVRagClient("http://127.0.0.1:8321") as client:
        client.add(DocumentInput("Anna keeps the lamp of Karsk."))
        print(client.ask("Who keeps the lamp?", k=4).answer)

`AsyncKVRagClient` is the same with coroutines.
"""

from __future__ import annotations

from kvrag.errors import MissingExtraError

try:
    import httpx as _httpx  # noqa: F401
    import httpx_retries as _httpx_retries  # noqa: F401
    import httpx_sse as _httpx_sse  # noqa: F401
except ImportError as exc:
    raise MissingExtraError(
        f"the client needs {exc.name}; install it with: pip install 'kvrag[client]'"
    ) from exc

from kvrag.client.asynchronous import AsyncAnswerStream, AsyncKVRagClient
from kvrag.client.calls import DocumentInput
from kvrag.client.errors import (
    ApiError,
    BadReplyError,
    ClientError,
    RefusedError,
    ServerError,
    TimedOutError,
    UnfinishedStreamError,
    UnreachableError,
)
from kvrag.client.results import (
    Added,
    AddReport,
    Answer,
    Control,
    Document,
    DocumentPage,
    Health,
    KVHandle,
    Match,
    Report,
    RetrievedChunk,
    Source,
    Spans,
    TokenCounts,
    TokenReport,
)
from kvrag.client.synchronous import AnswerStream, KVRagClient

__all__ = [
    "AddReport",
    "Added",
    "Answer",
    "AnswerStream",
    "ApiError",
    "AsyncAnswerStream",
    "AsyncKVRagClient",
    "BadReplyError",
    "ClientError",
    "Control",
    "Document",
    "DocumentInput",
    "DocumentPage",
    "Health",
    "KVHandle",
    "KVRagClient",
    "Match",
    "RefusedError",
    "Report",
    "RetrievedChunk",
    "ServerError",
    "Source",
    "Spans",
    "TimedOutError",
    "TokenCounts",
    "TokenReport",
    "UnfinishedStreamError",
    "UnreachableError",
]
