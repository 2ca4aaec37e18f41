"""Bodies of requests and answers.

Nothing is converted silently: a wrong type or an unknown field is refused. Every check stops at the
first wrong element, so that a hostile body cannot make thousands of complaints.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from kvrag.fusion.controller import Reason
from kvrag.retrieval.errors import FilterError
from kvrag.retrieval.where import Where
from kvrag.retriever import HandleState
from kvrag.searching import RerankMode, Search, SearchMode

__all__ = [
    "AddBody",
    "AddReport",
    "Added",
    "AnswerBody",
    "AskBody",
    "BlendingBody",
    "ChatBody",
    "Deleted",
    "DocumentBody",
    "DocumentList",
    "DocumentPage",
    "ErrorBody",
    "Health",
    "PageQuery",
    "QueryBody",
    "RetrieveBody",
    "Retrieved",
    "ShownDocumentBody",
    "StoredDocumentBody",
    "TierBody",
    "error_responses",
]

#: In one request, and on one page.
_MAX_DOCUMENTS = 1000
#: SQLite counts rows in 64 bits.
_MAX_OFFSET = 2**62
_MAX_PASSAGES = 1000
_MAX_MESSAGES = 1000
_MAX_K = 1000
_MAX_STOPS = 16
_MAX_DEPTH = 32


def _printable(name: object) -> str:
    return str(name)[:100].encode("utf-8", "backslashreplace").decode()


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                raise PydanticCustomError(
                    "unknown_field",
                    "unknown field; allowed are {allowed}",
                    {"field": _printable(name), "allowed": ", ".join(cls.model_fields)},
                )
        return data


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _unicode(text: str) -> str:
    # JSON escapes can bring in lone surrogates, which no tokenizer and no database takes.
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise PydanticCustomError("unicode", "is not valid Unicode") from exc
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "must hold more than whitespace")
    return text


Line = Annotated[str, AfterValidator(_unicode)]
Text = Annotated[Line, AfterValidator(_not_blank)]

# ---- questions -----------------------------------------------------------------------------------


class PassageBody(_Request):
    title: Line = ""
    text: Text


def _as_passage(value: Any) -> Any:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise PydanticCustomError("passage", "a passage is a text or an object with `text`")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


PassageIn = Annotated[
    PassageBody, BeforeValidator(_as_passage, json_schema_input_type=str | PassageBody)
]
StopText = Annotated[Line, Field(min_length=1)]
StopTexts = Annotated[
    list[StopText],
    Field(max_length=_MAX_STOPS, fail_fast=True),
    BeforeValidator(_as_list, json_schema_input_type=StopText | list[StopText]),
]


def _check_where(fields: dict[str, Any]) -> dict[str, Any]:
    try:
        Where.parse(fields)
    except FilterError as exc:
        raise PydanticCustomError("where", "{reason}", {"reason": str(exc)}) from exc
    return fields


WhereIn = Annotated[dict[str, Any], AfterValidator(_check_where)]
SEARCH = Field(None, description="How chunks are found: by meaning, by words, or by both.")
WHERE = Field(
    None,
    description="Filter over the documents' metadata: a field's value, or an object of `eq`, "
    "`in`, `gt`, `gte`, `lt`, `lte`. All fields must hold.",
)
MMR = Field(
    None,
    ge=0,
    le=1,
    allow_inf_nan=False,
    description="Part of relevance in choosing chunks, the rest being novelty.",
)
DISTINCT = Field(
    None,
    ge=0,
    le=1,
    allow_inf_nan=False,
    description="Leave out chunks more similar than that to a better one.",
)
RERANK = Field(
    None, description="Whether the server's cross-encoder, if it has one, orders chunks anew."
)
#: Together they are one `Search`.
_SEARCH_FIELDS = {"search", "where", "mmr", "distinct", "rerank"}


class AskBody(_Request):
    """What an answer rests on, and how it is made.

    A field that is absent or null has the server's default.
    """

    passages: (
        Annotated[list[PassageIn], Field(min_length=1, max_length=_MAX_PASSAGES, fail_fast=True)]
        | None
    ) = Field(None, description="Texts, or objects with `text` and perhaps `title`, in order.")
    k: int | None = Field(
        None, ge=1, le=_MAX_K, description="Chunks to retrieve; not together with passages."
    )
    search: SearchMode | None = SEARCH
    where: WhereIn | None = WHERE
    mmr: float | None = MMR
    distinct: float | None = DISTINCT
    rerank: RerankMode | None = RERANK
    strategy: Line | None = Field(
        None, description="Fusion strategy, perhaps with options: `epic:tokens=4`."
    )
    ratio: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Recompute ratio."
    )
    max_tokens: int | None = Field(None, ge=1, description="At most this many new tokens.")
    temperature: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="0, the default, is greedy."
    )
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, description="0 is all.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Makes sampling repeatable.")
    stop: StopTexts | None = Field(
        None, description="A text or a list of texts that end the answer; not part of it."
    )
    per_token: bool = Field(False, description="Whether the report tells of each context token.")
    stream: bool = Field(False, description="Answer with server-sent events.")

    @field_validator("k")
    @classmethod
    def _passages_or_k(cls, k: int | None, info: ValidationInfo) -> int | None:
        if k is not None and info.data.get("passages") is not None:
            raise PydanticCustomError("passages_and_k", "give passages or k, not both")
        return k

    @field_validator(*_SEARCH_FIELDS)
    @classmethod
    def _passages_or_search(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("passages") is not None:
            raise PydanticCustomError("passages_and_search", "is of the corpus, not of passages")
        return value

    def options(self) -> dict[str, Any]:
        """Arguments of `Engine.stream` and `chat`; what is null is left to the engine."""
        others = {"question", "messages", "stream"}
        options = self.model_dump(exclude=others | _SEARCH_FIELDS, exclude_none=True)
        if any(getattr(self, name) is not None for name in _SEARCH_FIELDS):
            options["search"] = Search(
                self.search, self.where, self.mmr, self.distinct, self.rerank
            )
        return options


class QueryBody(AskBody):
    """A question over the passages that it brings, or over the `k` nearest chunks of the corpus."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "question": "Who keeps the lamp?",
                    "passages": [{"title": "Karsk", "text": "Anna keeps the lamp of Karsk."}],
                    "max_tokens": 32,
                },
                {"question": "Who keeps the lamp?", "k": 4, "stream": True},
            ]
        }
    )

    question: Text


class MessageBody(_Request):
    role: Literal["system", "user", "assistant"]
    content: Line


class ChatBody(AskBody):
    """A conversation, whose last message is the user's.

    It is answered from the passages, from the `k` nearest chunks, or, with neither, from the
    conversation alone.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [
                        {"role": "system", "content": "Answer in one sentence."},
                        {"role": "user", "content": "Who keeps the lamp?"},
                    ],
                    "k": 4,
                }
            ]
        }
    )

    messages: Annotated[
        list[MessageBody], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)
    ]


class RetrieveBody(_Request):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"question": "Who keeps the lamp?", "k": 4}]}
    )

    question: Text
    k: int | None = Field(None, ge=1, le=_MAX_K, description="Chunks to retrieve.")
    search: SearchMode | None = SEARCH
    where: WhereIn | None = WHERE
    mmr: float | None = MMR
    distinct: float | None = DISTINCT
    rerank: RerankMode | None = RERANK
    prefetch: bool = Field(False, description="Whether to load the chunks' KV at once.")

    def options(self) -> dict[str, Any]:
        """Arguments of `Engine.retrieve`."""
        search = Search(self.search, self.where, self.mmr, self.distinct, self.rerank)
        return {"k": self.k, "prefetch": self.prefetch, "search": search}


class KVBody(_Reply):
    """A handle on the KV of a chunk, for its place among those it was retrieved with."""

    id: str = Field(description="Opaque; the same for the same KV.")
    tier: str | None = Field(description="The fastest tier that holds it, null for none.")
    state: HandleState


class MatchBody(_Reply):
    """How a chunk was found. Null: not by that index, or not among its first ones."""

    dense_rank: int | None = Field(description="From 1; the place by cosine similarity.")
    cosine: float | None = Field(description="Similarity of question and chunk.")
    lexical_rank: int | None = Field(description="From 1; the place by BM25.")
    bm25: float | None


class RetrievedChunkBody(_Reply):
    """`source` and `metadata` are the document's."""

    id: str
    document: str
    title: str
    text: str
    source: str
    metadata: dict[str, Any] | None
    score: float = Field(description="What it was ranked by, as in sources of answers.")
    match: MatchBody | None
    kv: KVBody


class Retrieved(_Reply):
    chunks: list[RetrievedChunkBody] = Field(description="The best first.")


class TokenCountsBody(_Reply):
    prompt: int
    reused: int
    recomputed: int
    computed: int


class SpansBody(_Reply):
    """Seconds."""

    retrieve: float
    load: float
    stall: float
    compute: float
    decode: float


class TokenReportBody(_Reply):
    """A context token. `score` is what the strategy gave it last, null where it gave none."""

    position: int
    recomputed: bool
    score: float | None


class ControlBody(_Reply):
    """What the controller decided, and what it foresaw in seconds.

    Predictions are null while something that they need was never measured.
    """

    ratio: float | None = Field(description="Of the strategy that ran; null where it has none.")
    reason: Reason
    predicted_ttft_s: float | None
    predicted_stall_s: float | None
    error: float | None = Field(description="|predicted - actual| / actual of `ttft_s`.")


class ReportBody(_Reply):
    strategy: str
    ttft_s: float
    effective_ratio: float
    prefix_match: bool
    tokens: TokenCountsBody
    spans: SpansBody
    dropped: list[str]
    warnings: list[str]
    per_token: list[TokenReportBody] | None = Field(description="If asked for with `per_token`.")
    control: ControlBody | None = Field(description="Null if it was cancelled before it began.")


class SourceBody(_Reply):
    """A chunk of the prompt. `document`, `score` and `match` are null for passages."""

    id: str
    document: str | None
    title: str
    text: str
    score: float | None = Field(
        description="What it was ranked by: fused ranks (1 is first by meaning and by words) of a "
        "hybrid search, cosine similarity of a dense one, BM25 of a lexical one."
    )
    tier: str = Field(
        description="Where its KV came from; `computed` if no tier had it, "
        "`awaited` if another request was computing it."
    )
    match: MatchBody | None


class AnswerBody(_Reply):
    answer: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "cancelled"]
    sources: list[SourceBody]
    report: ReportBody


# ---- documents -----------------------------------------------------------------------------------


def _check_depth(metadata: dict[str, Any]) -> dict[str, Any]:
    """What JSON can nest deeper than we can write must not get into the catalog."""
    level: list[Any] = [metadata]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return metadata
    raise PydanticCustomError("depth", f"must not be nested deeper than {_MAX_DEPTH} levels")


class DocumentBody(_Request):
    """A document; its id follows from title and text, unless one is given."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"title": "Karsk", "text": "Anna keeps the lamp of Karsk."}]
        }
    )

    title: Line = ""
    text: Text
    id: Annotated[Line, Field(min_length=1, max_length=256)] | None = Field(
        None, description="What has this id already is replaced."
    )
    source: Line = Field("", description="Where it came from, for people.")
    metadata: Annotated[dict[str, Any], AfterValidator(_check_depth)] | None = None


class DocumentList(_Request):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"documents": [{"text": "Anna keeps the lamp of Karsk."}]}]}
    )

    documents: Annotated[
        list[DocumentBody], Field(min_length=1, max_length=_MAX_DOCUMENTS, fail_fast=True)
    ]


def _one_or_many(value: Any) -> str:
    return "<many>" if isinstance(value, dict) and "documents" in value else "<one>"


AddBody = Annotated[
    Annotated[DocumentBody, Tag("<one>")] | Annotated[DocumentList, Tag("<many>")],
    Discriminator(_one_or_many),
]


class PageQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=_MAX_DOCUMENTS)
    offset: int = Field(0, ge=0, le=_MAX_OFFSET)


class AddReport(_Reply):
    """Work done for the documents of this request; no other document's KV is computed.

    For documents that were there already, only what they still lack is computed.
    """

    chunks_computed: int = Field(description="Chunks whose KV was computed and stored now.")
    chunks_stored_before: int = Field(description="Chunks whose KV was stored already.")
    tokens_computed: int = Field(description="Tokens of the chunks computed now.")
    bytes_written: int = Field(description="Bytes of KV stored now.")
    seconds: float = Field(description="Of computing and storing KV alone.")


class Added(_Reply):
    ids: list[str] = Field(description="One a document, in the order of the request.")
    new: int
    known: int = Field(description="Documents that were in the corpus already.")
    chunks: int = Field(description="Chunks of the documents of this request.")
    report: AddReport


class StoredDocumentBody(_Reply):
    id: str
    title: str
    source: str
    metadata: dict[str, Any] | None
    added_at: float = Field(description="Seconds since 1970, UTC.")
    num_chunks: int


class ShownDocumentBody(StoredDocumentBody):
    text: str | None = Field(description="Null if the document's id follows from its content.")


class DocumentPage(_Reply):
    documents: list[StoredDocumentBody]
    limit: int
    offset: int


class Deleted(_Reply):
    id: str
    deleted: Literal[True]


# ---- the server ----------------------------------------------------------------------------------


class CheckBody(_Reply):
    """One check of `kvrag verify`."""

    name: str
    subject: str = Field(description="The strategy, or the kind of layer, that was checked.")
    value: float | None = Field(description="What was measured; null if it was no number.")
    bound: float | None = Field(description="The most that passes; null if nothing is measured.")
    passed: bool
    sentence: str


class BlendingBody(_Reply):
    """Whether stored KV is blended into prompts; if not, every answer is full prefill's."""

    allowed: bool
    reason: str | None = Field(description="Why it is refused, or was not checked.")
    checks: list[CheckBody]


class TierEstimateBody(_Reply):
    bytes_per_s: float | None = Field(description="Of what it must be waited for.")
    cached_bytes_per_s: float | None = Field(description="Of what lies in memory all the same.")
    latency_s: float = Field(description="Seconds that a chunk's first byte adds.")
    nbytes: int = Field(description="Bytes measured so far.")


class ControllerBody(_Reply):
    """What was measured, recent requests most; null where nothing was."""

    full_flops_per_s: float | None = Field(description="Of full prefill and chunks alone.")
    blend_flops_per_s: float | None = Field(description="Of blends, all else of them included.")
    placed_s_per_token: float | None = Field(description="Rotating and writing a stored token.")
    tiers: dict[str, TierEstimateBody]
    forecasts: int
    ttft_error: float | None = Field(description="Mean of |predicted - actual| / actual.")
    stall_error: float | None = Field(description="The same of stalls of 0.05 s and more.")
    raised: int = Field(description="Decisions for a higher ratio.")
    full: int = Field(description="Decisions for full prefill, since loading is slower.")


class LatencyBody(_Reply):
    counts: list[int] = Field(
        description="Operations by duration: up to 16 microseconds, 32, 64, … 16.8 s, and longer."
    )
    sum_s: float


class TierBody(_Reply):
    """One tier since the server was started."""

    name: str
    durable: bool
    policy: str
    healthy: bool = Field(description="Whether the last operation worked.")
    nbytes: int
    limit_bytes: int | None
    blocks: int
    hits: int
    misses: int
    bytes_read: int
    bytes_written: int
    evictions: int
    expired: int = Field(description="Blocks deleted after their time to live.")
    refused: int = Field(description="Blocks not written, for want of room or by a failure.")
    damaged: int
    errors: int
    pending_blocks: int = Field(description="Blocks that wait to be written back.")
    pending_nbytes: int
    lookup_latency: LatencyBody
    read_latency: LatencyBody
    write_latency: LatencyBody
    listed_s: float | None = Field(
        description="Seconds since the tier was asked what it holds. Blocks of other processes are "
        "counted as of then, but where this one came across them; null: it could not be asked yet."
    )


class Health(_Reply):
    status: Literal["ok"]
    model: str
    version: str
    queue_depth: int = Field(description="Requests that wait for the model.")
    running: int = Field(description="1 while the model works on a request.")
    blending: BlendingBody
    controller: ControllerBody
    owed_deletions: int = Field(
        description="Blocks of deleted documents that a tier could not delete yet."
    )
    tiers: list[TierBody] = Field(description="Of the store, the fastest first.")


class ErrorDetail(_Reply):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorBody(_Reply):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "k: input should be greater than or equal to 1",
                        "type": "invalid_request_error",
                        "param": "k",
                        "code": "invalid_value",
                    }
                }
            ]
        }
    )

    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of error responses."""
    return {
        status: {"model": ErrorBody, "description": HTTPStatus(status).phrase}
        for status in statuses
    }
