"""From chunks and a question to a fused KV cache, whatever the strategy, with its accounts."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from torch import Tensor

from kvrag.answer import Control, TokenCounts, TokenReport
from kvrag.blocks import MOST_WAIT_S, ChunkBlocks, PlacedBlocks, open_chunks
from kvrag.errors import InputError, PromptTooLongError
from kvrag.fusion.base import FusionReport, FusionStrategy, fuse
from kvrag.fusion.controller import ChunkSource, Controller, Decision
from kvrag.fusion.device import DeviceLoading, HeldChunks
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.stream import BlockStream, LayerKV, LoadingCancelled, TierRead
from kvrag.generation.kv_cache import KVCache
from kvrag.generation.kv_memory import KVMemory
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.models.source import Model
from kvrag.prompting import PromptLayout
from kvrag.retrieval.hybrid import Match
from kvrag.store.block import Block
from kvrag.store.codecs import Codec
from kvrag.store.tiered import BlockReader
from kvrag.text import check_text

__all__ = ["ContextChunk", "Fitted", "Prefill", "Prefilled"]

#: `Source.tier` of a chunk whose block no tier had, of one that another request was computing, and
#: of one that the device held.
COMPUTED, AWAITED, DEVICE = "computed", "awaited", "device"


@dataclass(frozen=True, slots=True)
class ContextChunk:
    """A chunk on its way into a prompt. `document`, `score` and `match` are None for passages."""

    id: str
    document: str | None
    title: str
    text: str
    token_ids: tuple[int, ...]
    score: float | None
    match: Match | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """A prompt within the model's context; `dropped` chunks are not part of it.

    blocks: one a chunk of the prompt, whose block is fused.
    """

    prompt: Prompt
    chunks: tuple[ContextChunk, ...]
    dropped: tuple[ContextChunk, ...]
    blocks: tuple[ChunkBlocks, ...]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt in the cache. logits: float32 (1, vocab). `tiers`: one name a chunk. Seconds.

    strategy: name of the one that ran. measured: bytes and seconds of what each tier delivered, by
    its name. fusion: what the strategy computed. control: what was foreseen, from this run's begin.
    """

    strategy: str
    prompt: Prompt
    cache: KVCache
    logits: Tensor
    tokens: TokenCounts
    effective_ratio: float
    tiers: tuple[str, ...]
    load_s: float
    stall_s: float
    measured: dict[str, TierRead]
    compute_s: float
    fusion: FusionReport
    control: Control
    warnings: tuple[str, ...]

    def per_token(self) -> tuple[TokenReport, ...]:
        """What became of each context token, in order."""
        recomputed = set(self.fusion.selected.tolist())
        first = len(self.prompt.prefix_ids)
        return tuple(
            TokenReport(position, position in recomputed, None if math.isnan(score) else score)
            for position, score in enumerate(self.fusion.scores.tolist(), start=first)
        )


class Prefill:
    """Runs prompts of one model and one corpus prefix. Thread-safe: state is in each run."""

    def __init__(
        self,
        model: Model,
        layout: PromptLayout,
        blocks: PlacedBlocks,
        prefixes: PrefixCache,
        controller: Controller,
        device: DeviceLoading | None = None,
        memory: KVMemory | None = None,
    ) -> None:
        """`device`: None where K and V are used where they load, which is on the CPU.

        `memory`: of the requests' caches; see `KVCache`.
        """
        self._model, self._layout, self._blocks = model, layout, blocks
        self._prefixes, self._controller = prefixes, controller
        self._device, self._memory = device, memory

    def fit(self, question: str, chunks: Sequence[ContextChunk], new_tokens: int) -> Fitted:
        """Lay the prompt out; the last chunks, which rank lowest, are dropped until it fits.

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
            prefix_ids, [chunk.token_ids for chunk in kept], question_ids, prefix_match=False
        )
        return self.placed(prompt, tuple(kept), tuple(chunks[len(kept) :]))

    def placed(
        self,
        prompt: Prompt,
        chunks: tuple[ContextChunk, ...] = (),
        dropped: tuple[ContextChunk, ...] = (),
    ) -> Fitted:
        """The prompt with the block that each chunk's place wants, and whether the first is exact.

        Whose block that is depends on what is stored, so it is asked once a request.
        """
        blocks = tuple(self._blocks.choose([span.token_ids for span in prompt.chunks]))
        first = blocks[0] if blocks else self._blocks.first
        match = prompt.prefix_ids == first.prefix_ids
        return Fitted(replace(prompt, prefix_match=match), chunks, dropped, blocks)

    def run(
        self,
        fitted: Fitted,
        strategy: FusionStrategy,
        *,
        new_tokens: int,
        adapt: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Prefilled | None:
        """Fill a cache with the prompt, with room for `new_tokens` more; None if cancelled.

        Blocks that are missing or damaged are computed alone, written and then fused like any
        other.

        Args:
            adapt: whether the controller may choose another ratio, or full prefill.
        """
        if cancelled():
            return None
        prompt, blocks = fitted.prompt, fitted.blocks
        keys = (kind.key(s.token_ids) for kind, s in zip(blocks, prompt.chunks, strict=True))
        device = self._device if strategy.uses_blocks else None
        with closing(HeldChunks(device, keys, len(prompt.chunks))) as held:
            run = _Run(
                self._model,
                blocks,
                self._blocks.codec,
                prompt,
                strategy,
                held,
                self._controller,
                self._memory,
                adapt=adapt,
            )
            return run.execute(self._prefixes, new_tokens, cancelled)


class _Run:
    """One prompt: sources of its blocks (`blocks`: one a chunk), warnings and clocks."""

    def __init__(
        self,
        model: Model,
        blocks: Sequence[ChunkBlocks],
        codec: Codec,
        prompt: Prompt,
        strategy: FusionStrategy,
        held: HeldChunks,
        controller: Controller,
        memory: KVMemory | None,
        *,
        adapt: bool,
    ) -> None:
        self._model, self._blocks, self._codec = model, blocks, codec
        self._prompt, self._held = prompt, held
        self._strategy, self._controller, self._adapt = strategy, controller, adapt
        self._memory = memory
        self._cancelled: Callable[[], bool] = lambda: False
        self._warnings: list[str] = []
        self._awaited: set[int] = set()  # chunks to load that another request computed
        self._awaited_s = 0.0

    def execute(
        self, prefixes: PrefixCache, new_tokens: int, cancelled: Callable[[], bool]
    ) -> Prefilled | None:
        begun = time.perf_counter()
        self._cancelled = cancelled
        model, prompt, held = self._model, self._prompt, self._held
        decoder = model.decoder
        cache = KVCache(
            decoder.config,
            prompt.length + new_tokens,
            dtype=decoder.compute_dtype,
            device=decoder.device,
            memory=self._memory,
        )
        try:
            with ExitStack() as opened:
                readers = self._open(opened)
                decision = self._decide(readers)
                decided = time.perf_counter()
                self._strategy = decision.strategy
                if not self._strategy.uses_blocks:
                    opened.close()  # nothing is pinned while it computes instead of loading
                    readers = []
                first_chunks = self._strategy.first_chunks(decoder, prompt)
                tiers = self._tiers(readers)
                # Loading begins here, beside all that is computed below.
                stream = BlockStream(
                    readers,
                    self._codec,
                    self._recompute,
                    held.first_to_load(first_chunks),
                    placing=held.in_place and decoder.kernels.native is not None,
                    cancelled=cancelled,
                )
                opened.callback(stream.close)
                layers = opened.enter_context(closing(held.layers(stream, first_chunks)))
                # Before any chunk is computed behind it: what this request computes was not cached.
                prefix_cached = prefixes.fill(cache, prompt.prefix_ids)
                holes = stream.holes
                for chunk in holes:
                    if cancelled():
                        return None
                    stream.compute(chunk)
                started, waited_s = time.perf_counter(), stream.stall_s
                fused = fuse(self._strategy.start(decoder, prompt, layers, cache), cancelled)
                ended = time.perf_counter()
        except LoadingCancelled:
            return None
        if fused is None:
            return None
        for chunk in stream.computed:
            tiers[held.to_load[chunk]] = AWAITED if chunk in self._awaited else COMPUTED
        measured = stream.measured
        self._controller.loaded(measured)
        as_planned = stream.computed == frozenset(holes)
        self._controller.ran(
            decision,
            compute_s=ended - started - (stream.stall_s - waited_s) if as_planned else 0.0,
            stall_s=stream.stall_s,
            seconds=ended - decided,
        )
        stall_s = stream.stall_s + self._awaited_s
        tokens, ratio = self._accounts(fused.report, tiers, prefix_cached=prefix_cached)
        return Prefilled(
            strategy=self._strategy.name,
            prompt=prompt,
            cache=cache,
            logits=fused.logits,
            tokens=tokens,
            effective_ratio=ratio,
            tiers=tuple(tiers),
            load_s=stream.load_s,
            stall_s=stall_s,
            measured=measured,
            compute_s=time.perf_counter() - begun - stall_s,
            fusion=fused.report,
            control=_control(decision, decided - begun),
            warnings=tuple(dict.fromkeys(self._warnings)),
        )

    def _open(self, opened: ExitStack) -> list[BlockReader | None]:
        """A reader of each chunk to load, which `opened` closes; None where no tier has one."""
        wanted = self._held.to_load if self._strategy.uses_blocks else ()
        readers = open_chunks(
            [(self._blocks[chunk], self._prompt.chunks[chunk].token_ids) for chunk in wanted]
        )
        for reader in readers:
            if reader is not None:
                opened.callback(reader.close)
        return readers

    def _decide(self, readers: Sequence[BlockReader | None]) -> Decision:
        """What runs instead of what was asked for."""
        sources = [None if reader is None else _source(reader) for reader in readers]
        if self._strategy.uses_blocks:
            # What the device holds is not loaded.
            sources = self._held.spread(sources, ChunkSource(DEVICE, ()))
        return self._controller.decide(
            self._prompt,
            self._strategy,
            sources,
            adapt=self._adapt,
            behind=[len(blocks.prefix_ids) for blocks in self._blocks],
        )

    def _tiers(self, readers: Sequence[BlockReader | None]) -> list[str]:
        """Where each chunk's KV comes from, as far as that is known before."""
        if not self._strategy.uses_blocks:
            return ["none"] * len(self._prompt.chunks)
        loaded_from = [COMPUTED if reader is None else reader.tier for reader in readers]
        return self._held.spread(loaded_from, DEVICE)

    def _recompute(self, index: int) -> list[LayerKV]:
        """All layers of one of the chunks to load, computed here or by who began before."""
        chunk = self._held.to_load[index]
        blocks, token_ids = self._blocks[chunk], self._prompt.chunks[chunk].token_ids
        made = blocks.make(
            token_ids,
            lambda: self._computed(blocks, token_ids),
            cancelled=self._cancelled,
            # For all chunks together: who hangs holds a request up once.
            most_s=MOST_WAIT_S - self._awaited_s,
        )
        if made is None:
            raise LoadingCancelled
        self._awaited_s += made.waited_s
        if not made.computed:
            self._awaited.add(index)
        return blocks.layers(made.block)

    def _computed(self, blocks: ChunkBlocks, token_ids: Sequence[int]) -> Block:
        # What happens once a process tells nothing of the model's speed.
        blocks.prepare()
        begun = time.perf_counter()
        block = blocks.compute(token_ids)
        self._controller.computed_alone(
            len(blocks.prefix_ids), len(token_ids), time.perf_counter() - begun
        )
        outcome = blocks.put(block)
        if outcome.lost:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.refused)
            self._warnings.append(f"KV was computed but not stored durably ({reasons})")
        return block

    def _accounts(
        self, report: FusionReport, tiers: Sequence[str], *, prefix_cached: bool
    ) -> tuple[TokenCounts, float]:
        prompt = self._prompt
        layers = self._model.decoder.config.num_layers
        selected = report.selected.tolist()
        computed = len(prompt.question_ids) + (0 if prefix_cached else len(prompt.prefix_ids))
        recomputed = 0
        isolated_rows = 0
        for span, tier in zip(prompt.chunks, tiers, strict=True):
            if tier in (COMPUTED, "none"):
                computed += len(span.token_ids)
                isolated_rows += layers * len(span.token_ids) * (tier == COMPUTED)
            else:
                recomputed += bisect_left(selected, span.end) - bisect_left(selected, span.start)
        tokens = TokenCounts(
            prompt=prompt.length,
            reused=prompt.length - computed - recomputed,
            recomputed=recomputed,
            computed=computed,
        )
        rows = report.computed_rows + isolated_rows
        return tokens, rows / (layers * prompt.context_tokens) if prompt.context_tokens else 0.0


def _source(reader: BlockReader) -> ChunkSource:
    return ChunkSource(
        reader.tier,
        tuple(segment.padded_nbytes for segment in reader.header.segments),
        reader.cached_share,
    )


def _control(decision: Decision, before_s: float) -> Control:
    """`before_s`: seconds from the run's begin to the decision."""
    seconds = decision.predicted_s
    return Control(
        ratio=decision.strategy.ratio if decision.strategy.tunable else None,
        reason=decision.reason,
        predicted_ttft_s=None if seconds is None else before_s + seconds,
        predicted_stall_s=decision.predicted_stall_s,
    )
