"""From chunks and a question to a fused KV cache, whatever the strategy, with its accounts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvrag.answer import TokenCounts
from kvrag.blocks import ChunkBlocks
from kvrag.errors import InputError, PromptTooLongError
from kvrag.fusion.base import FusionReport, FusionStrategy, fuse
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.stream import BlockStream, LayerKV
from kvrag.generation.kv_cache import KVCache
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.models.source import Model
from kvrag.prompting import PromptLayout
from kvrag.store.tiered import BlockReader
from kvrag.text import check_text

__all__ = ["ContextChunk", "Fitted", "Prefill", "Prefilled"]

#: `Source.tier` of a chunk whose block no tier had.
COMPUTED = "computed"


@dataclass(frozen=True, slots=True)
class ContextChunk:
    """A chunk on its way into a prompt. `document` and `score` are None for passages."""

    id: str
    document: str | None
    title: str
    text: str
    token_ids: tuple[int, ...]
    score: float | None


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt within the model's context; `dropped` chunks are not part of it."""

    prompt: Prompt
    chunks: tuple[ContextChunk, ...]
    dropped: tuple[ContextChunk, ...]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt in the cache. logits: float32 (1, vocab). `tiers`: one name a chunk. Seconds."""

    prompt: Prompt
    cache: KVCache
    logits: Tensor
    tokens: TokenCounts
    effective_ratio: float
    tiers: tuple[str, ...]
    load_s: float
    stall_s: float
    compute_s: float
    warnings: tuple[str, ...]


class Prefill:
    """Runs prompts of one model and one corpus prefix. Thread-safe: state is in each run."""

    def __init__(
        self, model: Model, layout: PromptLayout, blocks: ChunkBlocks, prefixes: PrefixCache
    ) -> None:
        self._model, self._layout, self._blocks = model, layout, blocks
        self._prefixes = prefixes

    def fit(self, question: str, chunks: Sequence[ContextChunk], new_tokens: int) -> Fitted:
        """Lay the prompt out; the last chunks, which score lowest, are dropped until it fits.

        Raises:
            InputError: the question is empty.
            PromptTooLongError: prefix, question and `new_tokens` alone exceed the context.
        """
        if not check_text("the question", question).strip():
            raise InputError("the question is empty")
        prefix_ids = self._layout.prefix_ids
        question_ids = self._layout.question_ids(question)
        room = self._model.decoder.config.max_positions - new_tokens
        room -= len(prefix_ids) + len(question_ids)
        if room < 0:
            raise PromptTooLongError(
                f"the question takes {len(question_ids)} tokens, the prompt's prefix "
                f"{len(prefix_ids)} and the answer up to {new_tokens}; the model's context holds "
                f"{self._model.decoder.config.max_positions}"
            )
        kept: list[ContextChunk] = []
        for chunk in chunks:
            room -= len(chunk.token_ids)
            if room < 0:
                break
            kept.append(chunk)
        prompt = Prompt.build(
            prefix_ids,
            [chunk.token_ids for chunk in kept],
            question_ids,
            prefix_match=prefix_ids == self._blocks.prefix_ids,
        )
        return Fitted(prompt, tuple(kept), tuple(chunks[len(kept) :]))

    def run(
        self,
        prompt: Prompt,
        strategy: FusionStrategy,
        *,
        new_tokens: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Prefilled | None:
        """Fill a cache with the prompt, with room for `new_tokens` more; None if cancelled.

        Blocks that are missing or damaged are computed alone, written and then fused like any
        other.
        """
        run = _Run(self._model, self._blocks, prompt, strategy)
        return run.execute(self._prefixes, new_tokens, cancelled)


class _Run:
    """One prompt: sources of its blocks, warnings and clocks."""

    def __init__(
        self,
        model: Model,
        blocks: ChunkBlocks,
        prompt: Prompt,
        strategy: FusionStrategy,
    ) -> None:
        self._model, self._blocks, self._prompt = model, blocks, prompt
        self._strategy = strategy
        self._warnings: list[str] = []

    def execute(
        self, prefixes: PrefixCache, new_tokens: int, cancelled: Callable[[], bool]
    ) -> Prefilled | None:
        if cancelled():
            return None
        begun = time.perf_counter()
        model, prompt = self._model, self._prompt
        decoder = model.decoder
        cache = KVCache(
            decoder.config,
            prompt.length + new_tokens,
            dtype=decoder.compute_dtype,
            device=decoder.device,
        )
        first_chunks = self._strategy.first_chunks(decoder, prompt)
        readers = self._open()
        tiers = [COMPUTED if reader is None else reader.tier for reader in readers]
        # Loading begins here, beside all that is computed below.
        stream = BlockStream(readers, self._blocks.codec, self._recompute, first_chunks)
        try:
            # Before any chunk is computed behind it: what this request computes was not cached.
            prefix_cached = prefixes.fill(cache, prompt.prefix_ids)
            for chunk in stream.holes:
                if cancelled():
                    return None
                stream.compute(chunk)
            fused = fuse(self._strategy.start(decoder, prompt, stream, cache), cancelled)
        finally:
            stream.close()
        if fused is None:
            return None
        for chunk in stream.computed:
            tiers[chunk] = COMPUTED
        if not self._strategy.uses_blocks:
            tiers = ["none"] * len(prompt.chunks)
        tokens, ratio = self._accounts(fused.report, tiers, prefix_cached=prefix_cached)
        return Prefilled(
            prompt=prompt,
            cache=cache,
            logits=fused.logits,
            tokens=tokens,
            effective_ratio=ratio,
            tiers=tuple(tiers),
            load_s=stream.load_s,
            stall_s=stream.stall_s,
            compute_s=time.perf_counter() - begun - stream.stall_s,
            warnings=tuple(dict.fromkeys(self._warnings)),
        )

    def _open(self) -> list[BlockReader | None]:
        """An open reader for each chunk, None where no tier has a sound block."""
        readers: list[BlockReader | None] = []
        if not self._strategy.uses_blocks:
            return readers
        try:
            # One by one into the list: those that are open must be closed if one fails.
            readers.extend(self._blocks.open(span.token_ids) for span in self._prompt.chunks)
        except BaseException:
            for reader in readers:
                if reader is not None:
                    reader.close()
            raise
        return readers

    def _recompute(self, index: int) -> list[LayerKV]:
        block = self._blocks.compute(self._prompt.chunks[index].token_ids)
        outcome = self._blocks.put(block)
        if not outcome.durable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.refused)
            self._warnings.append(f"KV was computed but not stored durably ({reasons})")
        return self._blocks.layers(block)

    def _accounts(
        self, report: FusionReport, tiers: Sequence[str], *, prefix_cached: bool
    ) -> tuple[TokenCounts, float]:
        prompt = self._prompt
        layers = self._model.decoder.config.num_layers
        selected = report.selected
        computed = len(prompt.question_ids) + (0 if prefix_cached else len(prompt.prefix_ids))
        recomputed = 0
        isolated_rows = 0
        for span, tier in zip(prompt.chunks, tiers, strict=True):
            if tier in (COMPUTED, "none"):
                computed += len(span.token_ids)
                isolated_rows += layers * len(span.token_ids) * (tier == COMPUTED)
            else:
                recomputed += int(((selected >= span.start) & (selected < span.end)).sum())
        tokens = TokenCounts(
            prompt=prompt.length,
            reused=prompt.length - computed - recomputed,
            recomputed=recomputed,
            computed=computed,
        )
        rows = report.context_rows + isolated_rows
        return tokens, rows / (layers * prompt.context_tokens) if prompt.context_tokens else 0.0
