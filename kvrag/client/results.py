"""What the server answers, as objects. docs/rest.md explains each field.

A field that this release does not know is ignored: a newer server may tell more.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "AddReport",
    "Added",
    "Answer",
    "Control",
    "Deleted",
    "Document",
    "DocumentPage",
    "Health",
    "KVHandle",
    "Match",
    "Report",
    "Retrieved",
    "RetrievedChunk",
    "Source",
    "Spans",
    "TokenCounts",
    "TokenReport",
]


class _Result(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class TokenCounts(_Result):
    """Every prompt token once: `prompt = reused + recomputed + computed`."""

    prompt: int
    reused: int
    recomputed: int
    computed: int


class Spans(_Result):
    """Seconds."""

    retrieve: float
    load: float
    stall: float
    compute: float
    decode: float


class TokenReport(_Result):
    position: int
    recomputed: bool
    score: float | None


class Control(_Result):
    """What the controller decided, and what it foresaw in seconds."""

    ratio: float | None
    reason: str
    predicted_ttft_s: float | None
    predicted_stall_s: float | None
    error: float | None


class Report(_Result):
    """How an answer came about."""

    strategy: str
    ttft_s: float
    effective_ratio: float
    prefix_match: bool
    tokens: TokenCounts
    spans: Spans
    dropped: list[str]
    warnings: list[str]
    per_token: list[TokenReport] | None
    control: Control | None


class Match(_Result):
    """How a chunk was found. None: not by that index, or not among its first ones."""

    dense_rank: int | None
    cosine: float | None
    lexical_rank: int | None
    bm25: float | None


class Source(_Result):
    """A chunk of the prompt. `document`, `score` and `match` are None for passages."""

    id: str
    document: str | None
    title: str
    text: str
    score: float | None
    tier: str
    match: Match | None


class Answer(_Result):
    answer: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "cancelled"]
    sources: list[Source]
    report: Report


class KVHandle(_Result):
    """A handle on the KV of a chunk: opaque id, fastest tier that holds it, state."""

    id: str
    tier: str | None
    state: str


class RetrievedChunk(_Result):
    """`source` and `metadata` are the document's."""

    id: str
    document: str
    title: str
    text: str
    source: str
    metadata: dict[str, Any] | None
    score: float
    match: Match | None
    kv: KVHandle


class Retrieved(_Result):
    chunks: list[RetrievedChunk]


class AddReport(_Result):
    chunks_computed: int
    chunks_stored_before: int
    tokens_computed: int
    bytes_written: int
    seconds: float


class Added(_Result):
    """ids: one a document, in the order of the request."""

    ids: list[str]
    new: int
    known: int
    chunks: int
    report: AddReport


class Document(_Result):
    """A stored document. text: of one that was added with an id of its own, and was asked for."""

    id: str
    title: str
    source: str
    metadata: dict[str, Any] | None
    added_at: float
    num_chunks: int
    text: str | None = None


class DocumentPage(_Result):
    documents: list[Document]
    limit: int
    offset: int


class Deleted(_Result):
    id: str
    deleted: bool


class Health(_Result):
    """blending, controller and tiers are as docs/rest.md shows them."""

    status: str
    model: str
    version: str
    queue_depth: int
    running: int
    blending: dict[str, Any]
    controller: dict[str, Any]
    owed_deletions: int
    tiers: list[dict[str, Any]]
