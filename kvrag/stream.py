"""One question on its way to an answer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Self

from kvrag.answer import Answer, Control, Report, Source, Spans, TokenCounts
from kvrag.errors import KvragError
from kvrag.fusion.base import FusionStrategy
from kvrag.generation.decode import FinishReason, decode
from kvrag.generation.graph import GraphedDecoding
from kvrag.generation.params import GenerationParams
from kvrag.models.source import Model
from kvrag.prefill import Fitted, Prefill, Prefilled

__all__ = ["AnswerStream", "Context", "UnfinishedError"]


class UnfinishedError(KvragError):
    """`AnswerStream.answer` was asked for before the stream was at its end."""


class Context:
    """A laid-out prompt and how to fill a cache with it.

    `begun` is when the passages were known (`time.perf_counter`): TTFT counts from there. `adapt`:
    whether the controller may choose another ratio, or full prefill. `warnings` stand in front of
    those of the prefill.
    """

    def __init__(
        self,
        prefill: Prefill,
        fitted: Fitted,
        *,
        begun: float,
        retrieve_s: float,
        adapt: bool = False,
    ) -> None:
        self.warnings: tuple[str, ...] = ()
        self._prefill, self.fitted, self._adapt = prefill, fitted, adapt
        self.layout_s = time.perf_counter() - begun
        self.retrieve_s = retrieve_s

    def warned(self, warning: str) -> Self:
        """The same with one warning more."""
        context = copy.copy(self)
        context.warnings = (*self.warnings, warning)
        return context

    def prefill(
        self,
        strategy: FusionStrategy,
        *,
        new_tokens: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Prefilled | None:
        """See `Prefill.run`."""
        prefilled = self._prefill.run(
            self.fitted,
            strategy,
            new_tokens=new_tokens,
            adapt=self._adapt,
            cancelled=cancelled,
        )
        if prefilled is None or not self.warnings:
            return prefilled
        return replace(prefilled, warnings=(*self.warnings, *prefilled.warnings))


class AnswerStream:
    """Iterate once over pieces of text; then `.answer` holds the whole. `cancel()` ends it early.

    `.sources` is there from the start, with tiers that become known with the first piece.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        strategy: FusionStrategy,
        params: GenerationParams,
        cancelled: Callable[[], bool],
        *,
        per_token: bool = False,
        graphed: GraphedDecoding | None = None,
    ) -> None:
        """`per_token`: whether the report has an entry for each context token."""
        self._per_token, self._graphed = per_token, graphed
        self._model, self._context = model, context
        self._strategy, self._params = strategy, params
        self._asked_cancel = cancelled
        self._cancel = False
        self._answer: Answer | None = None
        self.sources = tuple(
            Source(c.id, c.document, c.title, c.text, c.score, tier="", match=c.match)
            for c in context.fitted.chunks
        )
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def cancel(self) -> None:
        """End the answer at the next layer or token; may be called from another thread."""
        self._cancel = True

    @property
    def answer(self) -> Answer:
        """The finished answer.

        Raises:
            UnfinishedError: the stream is not at its end.
        """
        if self._answer is None:
            raise UnfinishedError("the answer is not finished; iterate over the stream first")
        return self._answer

    def _cancelled(self) -> bool:
        return self._cancel or self._asked_cancel()

    def _run(self) -> Iterator[str]:
        context = self._context
        begun = time.perf_counter()
        prefilled = context.prefill(
            self._strategy, new_tokens=self._params.max_tokens, cancelled=self._cancelled
        )
        if prefilled is None:
            self._finish([], [], "cancelled", self._report(None, 0.0, 0.0))
            return
        self.sources = tuple(
            replace(source, tier=tier)
            for source, tier in zip(self.sources, prefilled.tiers, strict=True)
        )
        text: list[str] = []
        token_ids: list[int] = []
        finish_reason: FinishReason = "length"
        first_s: float | None = None
        decode_s, working = 0.0, time.perf_counter()
        for token in decode(
            self._model,
            prefilled.cache,
            prefilled.logits,
            self._params,
            self._cancelled,
            self._graphed,
        ):
            now = time.perf_counter()
            first_s = now - begun if first_s is None else first_s
            decode_s += now - working
            if token.token_id is not None:
                token_ids.append(token.token_id)
            finish_reason = token.finish_reason or finish_reason
            if token.text:
                text.append(token.text)
                yield token.text
            # What a slow reader takes is not decoding.
            working = time.perf_counter()
        report = self._report(prefilled, context.layout_s + (first_s or 0.0), decode_s)
        self._finish(text, token_ids, finish_reason, report)

    def _finish(
        self, text: list[str], token_ids: list[int], reason: FinishReason, report: Report
    ) -> None:
        self._answer = Answer("".join(text), tuple(token_ids), reason, self.sources, report)

    def _report(self, prefilled: Prefilled | None, ttft_s: float, decode_s: float) -> Report:
        fitted = self._context.fitted
        dropped = tuple(chunk.id for chunk in fitted.dropped)
        warnings = list(prefilled.warnings) if prefilled else []
        if dropped:
            warnings.append(
                f"the prompt was too long: {len(dropped)} of {len(fitted.chunks) + len(dropped)} "
                f"chunks were left out ({', '.join(dropped)})"
            )
        return Report(
            strategy=prefilled.strategy if prefilled else self._strategy.name,
            ttft_s=ttft_s,
            effective_ratio=prefilled.effective_ratio if prefilled else 0.0,
            prefix_match=(prefilled or fitted).prompt.prefix_match,
            tokens=prefilled.tokens if prefilled else TokenCounts(0, 0, 0, 0),
            spans=Spans(
                retrieve=self._context.retrieve_s,
                load=prefilled.load_s if prefilled else 0.0,
                stall=prefilled.stall_s if prefilled else 0.0,
                compute=prefilled.compute_s if prefilled else 0.0,
                decode=decode_s,
            ),
            dropped=dropped,
            warnings=tuple(warnings),
            per_token=prefilled.per_token() if prefilled and self._per_token else None,
            control=self._control(prefilled.control, ttft_s) if prefilled else None,
        )

    def _control(self, control: Control, ttft_s: float) -> Control:
        """What was foreseen, with what was known before, and how wrong that was."""
        seconds = control.predicted_ttft_s
        if seconds is None:
            return control
        seconds += self._context.layout_s
        error = abs(seconds - ttft_s) / ttft_s if ttft_s else None
        return replace(control, predicted_ttft_s=seconds, error=error)
