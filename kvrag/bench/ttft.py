"""Time to first token and decode speed: kvrag's strategies, transformers and peers, interleaved.

Every repetition draws other chunks in another order and another question, so that nothing but the
system text repeats from one prompt to the next; the blocks of all chunks lie in memory. All
contestants answer the same prompt before the next is drawn, since the machine's speed drifts.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvrag.bench.contestants import Contestant, Measured, Ours, PeerContestant, Transformers
from kvrag.bench.frame import print_environment, print_json, print_table
from kvrag.bench.peers import Load, Peer, PeerError, PeerOption
from kvrag.bench.plots import check_plotting, plot_lengths, plot_spans
from kvrag.bench.prompts import DrawnPrompt, Prompts
from kvrag.bench.ttft_result import COLUMNS, exponents, figures, rows
from kvrag.engine import Engine
from kvrag.errors import InputError, ModelError
from kvrag.fusion import create

__all__ = ["STRATEGIES", "TtftOptions", "run"]

#: What is measured besides the strategy that the settings name.
STRATEGIES = ("full", "reuse", "cacheblend", "true")


@dataclass(frozen=True, slots=True)
class TtftOptions:
    """What is measured.

    contexts: tokens of all chunks of a prompt. ratio: None for the settings' or each strategy's
    own. baseline_dtype: of transformers and of peers that name none; None for what we calculate
    in. peer_timeout_s: for a peer's start and for each answer. plot: a folder for pictures.

    Raises:
        InputError: a context is no whole number of chunks, or a peer is given twice.
    """

    contexts: tuple[int, ...] = (4096,)
    chunk_tokens: int = 256
    repetitions: int = 5
    new_tokens: int = 16
    strategies: tuple[str, ...] = STRATEGIES
    ratio: float | None = None
    baseline: bool = True
    baseline_dtype: str | None = None
    peers: tuple[PeerOption, ...] = ()
    peer_timeout_s: float = 1800
    plot: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for context in self.contexts:
            if context < self.chunk_tokens or context % self.chunk_tokens:
                raise InputError(
                    f"context is {context} tokens; it must be a multiple of {self.chunk_tokens}, "
                    "the tokens of a chunk"
                )
        labels = [peer.label for peer in self.peers]
        if len(set(labels)) < len(labels):
            raise InputError(f"peers are {', '.join(labels)}; each may be given once")


def run(engine: Engine, options: TtftOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON)."""
    if options.plot is not None:
        check_plotting()  # before the minutes of measuring, not behind them
    print_environment()
    contexts = sorted(set(options.contexts))
    lengths = {}
    with ExitStack() as stack:
        race = _Race(engine, options, contexts, stack)
        for context in contexts:
            lengths[context] = race.measure(context)
            title = f"TTFT, {context} context tokens, {engine.settings.dtype}"
            print_table(title, COLUMNS, rows(lengths[context], race.skipped))
        facts = race.facts()
    # The figures of the longest context have the names that they have where it is the only one.
    *shorter, longest = contexts
    result = {**facts, **lengths[longest]}
    if shorter:
        result["lengths"] = {str(context): lengths[context] for context in shorter}
        result["exponents"] = exponents(lengths)
    if options.plot is not None:
        plot_lengths(options.plot, lengths, facts)
        plot_spans(options.plot, lengths[longest], facts)
    print_json(result)
    return result


class _Race:
    """The contestants, the prompts they answer, and who had to give up. Peers end with `stack`."""

    def __init__(
        self, engine: Engine, options: TtftOptions, contexts: list[int], stack: ExitStack
    ) -> None:
        self._engine, self._options, self._stack = engine, options, stack
        self._chunks = {context: context // options.chunk_tokens for context in contexts}
        compute_dtype = str(engine.model.decoder.compute_dtype).removeprefix("torch.")
        # Where the CPU has no bfloat16 arithmetic, others are faster in float32, too.
        self._baseline_dtype = options.baseline_dtype or compute_dtype
        # One warms up; each of the others begins with a passage of its own.
        prompts = 1 + options.repetitions * len(contexts)
        self._draw = Prompts(
            engine.model.tokenizer,
            pool=max(prompts, 2 * max(self._chunks.values())),
            chunk_tokens=options.chunk_tokens,
            seed=options.seed,
        )
        self._rng = random.Random(options.seed)
        self._contestants: list[Contestant] = []
        self.skipped: dict[str, str] = {}
        self._gather()

    def measure(self, context: int) -> dict[str, Any]:
        """All repetitions at one context length, as figures."""
        measured: dict[str, list[Measured]] = {
            name: [] for contestant in self._contestants for name in contestant.names
        }
        for _ in range(self._options.repetitions):
            prompt = self._draw.next(self._chunks[context])
            # The order within a repetition changes too: nobody always runs on warm caches.
            for contestant in self._rng.sample(self._contestants, len(self._contestants)):
                answers = self._answers(contestant, prompt)
                for name in contestant.names:
                    if answers is None:  # half a row of figures is none
                        del measured[name]
                    else:
                        measured[name].append(answers[name])
        return {
            "context_tokens": context,
            **figures(
                measured,
                computing_all=[c.names[0] for c in self._contestants if c.computes_all],
                default=self._engine.settings.strategy,
            ),
        }

    def facts(self) -> dict[str, Any]:
        """What holds at every length."""
        engine, options = self._engine, self._options
        default = engine.settings.strategy
        return {
            "benchmark": "ttft",
            "default_strategy": default,
            "skipped": self.skipped,
            "threads": torch.get_num_threads(),
            "dtype": engine.settings.dtype,
            "compute_dtype": str(engine.model.decoder.compute_dtype).removeprefix("torch."),
            "baseline_dtype": self._baseline_dtype if options.baseline else None,
            "decode_weights": engine.settings.decode_weights,
            "codec": engine.settings.codec,
            "requested_ratio": _ratio(engine, default, options.ratio),
            "repetitions": options.repetitions,
            "model": engine.settings.model,
        }

    def _gather(self) -> None:
        """Compute the blocks, which stay in memory, and start everybody, one at a time."""
        engine, options = self._engine, self._options
        warm_up = self._draw.next(min(self._chunks.values()))
        max_tokens = self._max_tokens(warm_up)
        for strategy in dict.fromkeys((*options.strategies, engine.settings.strategy)):
            ours = Ours(engine, strategy, ratio=options.ratio, new_tokens=options.new_tokens)
            self._contestants.append(ours)
        for passage in self._draw.pool:
            engine.answer("Warm up?", passages=[passage], strategy="reuse", max_tokens=1)
        if options.baseline:
            self._contestants.append(
                Transformers(engine, dtype=self._baseline_dtype, new_tokens=options.new_tokens)
            )
        scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kvrag-peer-")))
        for option in options.peers:
            try:
                self._contestants.append(self._peer(option, scratch, max_tokens))
            except (PeerError, ModelError) as exc:
                self.skipped[option.label] = str(exc)
        for contestant in tuple(self._contestants):
            self._answers(contestant, warm_up)

    def _max_tokens(self, shortest: DrawnPrompt) -> int:
        """Tokens of the longest prompt and its answer.

        Raises:
            InputError: the model's context does not hold them.
        """
        engine, options = self._engine, self._options
        prompt = len(engine.prompt_ids(shortest.question, shortest.passages))
        prompt += options.chunk_tokens * (max(self._chunks.values()) - min(self._chunks.values()))
        most = engine.model.decoder.config.max_positions
        if prompt + options.new_tokens > most:
            raise InputError(
                f"context {max(self._chunks)} takes {prompt} tokens as a prompt and "
                f"{options.new_tokens} for the answer; the model's context holds {most}"
            )
        return prompt + options.new_tokens

    def _peer(self, option: PeerOption, scratch: Path, max_tokens: int) -> PeerContestant:
        engine, options = self._engine, self._options
        load = Load(
            model=str(engine.model.folder),
            dtype=option.dtype or self._baseline_dtype,
            threads=torch.get_num_threads(),
            max_tokens=max_tokens,
        )
        peer = Peer.start(option, load, scratch=scratch, timeout_s=options.peer_timeout_s)
        self._stack.enter_context(peer)
        return PeerContestant(engine, option.label, peer, new_tokens=options.new_tokens)

    def _answers(
        self, contestant: Contestant, prompt: DrawnPrompt
    ) -> Mapping[str, Measured] | None:
        """What a contestant answers; None, and it is out of the race, if it fails."""
        try:
            return contestant.measure(prompt)
        except PeerError as exc:
            self._contestants.remove(contestant)
            self.skipped[contestant.names[0]] = str(exc)
            return None


def _ratio(engine: Engine, strategy: str, ratio: float | None) -> float:
    """The recompute ratio that `strategy` was asked for."""
    asked = ratio if ratio is not None else engine.settings.ratio
    return create(strategy, asked).ratio
