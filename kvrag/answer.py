"""What comes back for a question: the answer, its sources and a report of where the time went."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvrag.fusion.controller import Reason
from kvrag.generation.decode import FinishReason
from kvrag.retrieval.hybrid import Match

__all__ = ["Answer", "Report", "Source", "Spans", "TokenCounts", "TokenReport"]


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Every prompt token once: `prompt = reused + recomputed + computed`. All 0 if cancelled.

    computed: prefix and question not served from a cache, and all tokens of chunks that were
    missing. recomputed: tokens of stored chunks in the selection of the first filtered layer.
    reused: the rest.
    """

    prompt: int
    reused: int
    recomputed: int
    computed: int


@dataclass(frozen=True, slots=True)
class TokenReport:
    """One context token. score: what the strategy gave it last; None where it gave none."""

    position: int
    recomputed: bool
    score: float | None


@dataclass(frozen=True, slots=True)
class Spans:
    """Seconds. `load` runs beside `compute`; what it did not hide is `stall`."""

    retrieve: float
    load: float
    stall: float
    compute: float
    decode: float


@dataclass(frozen=True, slots=True)
class Control:
    """What the controller decided before a prompt ran, and what it foresaw.

    ratio: of the strategy that ran, None where it means nothing. Predictions are seconds, None
    while something that they need was never measured. error: |predicted - actual| / actual of the
    time to the first token.
    """

    ratio: float | None
    reason: Reason
    predicted_ttft_s: float | None
    predicted_stall_s: float | None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """How an answer came about.

    ttft_s: from the call, with the passages known, to the first sampled token.
    effective_ratio: rows computed for context tokens, summed over the layers, divided by layers ×
        context tokens; fully computed layers and missing chunks included.
    prefix_match: the first chunk's block was computed behind the prompt's prefix, and is exact.
    dropped: ids of chunks that did not fit into the context.
    warnings: sentences about what went wrong without spoiling the answer.
    per_token: one entry a context token, in order; None unless it was asked for.
    control: None if the answer was cancelled before anything was decided.
    """

    strategy: str
    ttft_s: float
    effective_ratio: float
    prefix_match: bool
    tokens: TokenCounts
    spans: Spans
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    per_token: tuple[TokenReport, ...] | None = None
    control: Control | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A chunk of the prompt.

    document, score and match: None for passages. score: what its search ranked it by, see
    docs/retrieval.md. match: how it was found. tier: where its KV came from; "device" if the
    device held it, "computed" if no tier had it, "none" if the strategy reads no blocks.
    """

    id: str
    document: str | None
    title: str
    text: str
    score: float | None
    tier: str
    match: Match | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The text of a continuation, its token ids without the end token, and how it came about."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    sources: tuple[Source, ...]
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the names that CLI and REST show: `answer`, `token_ids`, …"""
        content = dataclasses.asdict(self)
        return {"answer": content.pop("text"), **content}
