"""How near a strategy's output is to full prefill's, item by item on the same prompts.

KL divergence of the next-token distributions along full prefill's own greedy answer; the negative
log-likelihood of the gold answer: its paired difference and, since a strategy may beat full prefill
by chance, the mean of the differences' absolute values; and F1 of each strategy's own greedy
answer. Intervals are bootstrapped over groups of items that share passages.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from kvrag.bench.frame import print_environment, print_json, print_table
from kvrag.bench.intervals import interval, shown
from kvrag.bench.items import Distractors, Half, Item, drawn, load_items
from kvrag.bench.overlap import f1
from kvrag.bench.plots import check_plotting, plot_frontier
from kvrag.engine import Engine
from kvrag.errors import InputError
from kvrag.fusion import FusionStrategy, create
from kvrag.prefill import Prefilled
from kvrag.verify.divergence import divergence, greedy_answer

__all__ = ["STRATEGIES", "FidelityOptions", "at_ratios", "run"]

STRATEGIES = (
    "reuse",
    "epic",
    "random:ratio=0.15",
    "nearest:ratio=0.15",
    "cacheblend:ratio=0.15",
    "dhd:ratio=0.15",
    "query_attention:ratio=0.15",
    "fast",
    "true",
)
#: Name in the JSON and heading in the table.
METRICS = {
    "kl": "KL",
    "kl_first": "KL first",
    "dnll_mean": "ΔNLL",
    "dnll_abs": "|ΔNLL|",
    "f1": "F1",
}


@dataclass(frozen=True, slots=True)
class FidelityOptions:
    """items drawn, which half of the groups, strategies as `at_ratios` takes them.

    context_tokens: lengths to fill the items' contexts to (see `Distractors`); none leaves them as
    they are. answers: whether every strategy also writes its answer, for F1. other_prefix: the
    text that blocks are computed behind in the place of the prompt's own prefix, so that the two
    differ.

    Raises:
        InputError: a length is no number of tokens.
    """

    items: int = 100
    half: Half = "odd"
    strategies: tuple[str, ...] = STRATEGIES
    context_tokens: tuple[int, ...] = ()
    new_tokens: int = 32
    answers: bool = False
    other_prefix: str | None = None
    plot: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for tokens in self.context_tokens:
            if tokens < 1:
                raise InputError(f"context tokens are {tokens}; they must be 1 or more")


@dataclass(frozen=True, slots=True)
class _Set:
    """Items under the name that their figures have. context_tokens: None as the file has them."""

    name: str
    items: list[Item]
    context_tokens: int | None = None


def at_ratios(strategy: str) -> list[str]:
    """One strategy a ratio: `fast:ratio=0.02,0.05` is `fast:ratio=0.02` and `fast:ratio=0.05`."""
    name, _, given = strategy.partition(":")
    options = given.split(",")
    first = next((at for at, part in enumerate(options) if part.startswith("ratio=")), None)
    if first is None:
        return [strategy]
    # What has no name goes on with the ratios.
    last = next((at for at in range(first + 1, len(options)) if "=" in options[at]), len(options))
    ratios = [options[first].removeprefix("ratio="), *options[first + 1 : last]]
    return [
        f"{name}:{','.join([*options[:first], f'ratio={ratio}', *options[last:]])}"
        for ratio in ratios
    ]


def run(engine: Engine, paths: Sequence[Path], options: FidelityOptions) -> dict[str, Any]:
    """Measure, print a table a set and the JSON line (see docs/benchmarks.md), and return it."""
    names = [name for given in options.strategies for name in at_ratios(given)]
    strategies = {name: create(name) for name in names}
    if options.plot is not None:
        check_plotting()
    chosen = [of for path in paths for of in _sets(engine, path, options)]
    print_environment()
    sets: dict[str, dict[str, dict[str, Any]]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for of in chosen:
        sets[of.name], facts[of.name] = _measure(engine, of, strategies, options)
        _print(of.name, sets[of.name], facts[of.name])
    result = {
        "benchmark": "fidelity",
        "fidelity": sets,
        "full": facts,
        "half": options.half,
        "prefix_match": options.other_prefix is None,
        "dtype": engine.settings.dtype,
        "codec": engine.settings.codec,
        "model": engine.settings.model,
    }
    if options.plot is not None:
        result["plots"] = [str(file) for file in plot_frontier(options.plot, sets, facts)]
    print_json(result)
    return result


def _sets(engine: Engine, path: Path, options: FidelityOptions) -> list[_Set]:
    """The items of a file, once a context length if lengths are asked for.

    Raises:
        InputError: see `load_items` and `Distractors`; or the model's context is too short.
    """
    half = load_items(path, options.half)
    items = drawn(half, options.items, options.seed)
    if not options.context_tokens:
        return [_Set(path.stem, items)]
    distractors = Distractors(half, engine.model.tokenizer, options.seed)
    sets = [
        _Set(f"{path.stem}@{tokens}", [distractors.lengthened(i, tokens) for i in items], tokens)
        for tokens in sorted(set(options.context_tokens))
    ]
    for item in sets[-1].items:
        new_tokens = max(options.new_tokens, len(_gold_ids(engine, item)))
        prompt = engine.prompt(item.question, item.passages, new_tokens=new_tokens)
        if len(prompt.chunks) < len(item.passages):
            raise InputError(
                f"a context of {sets[-1].context_tokens} tokens does not leave room for the prompt "
                f"around it and {new_tokens} tokens more; the model's context holds "
                f"{engine.model.decoder.config.max_positions}"
            )
    return sets


def _measure(
    engine: Engine, of: _Set, strategies: dict[str, FusionStrategy], options: FidelityOptions
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """A set's figures by strategy, and those of full prefill."""
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in strategies}
    fulls = []
    rng = random.Random(options.seed)
    for item in track(of.items, description=of.name, transient=True):
        # A passage that stood elsewhere in an earlier prompt has a block for that place.
        for key in list(engine.store.keys()):
            engine.store.delete(key)
        full = _Full(engine, item, options)
        fulls.append(full)
        # In another order each time: nobody always runs on warm caches.
        for name in rng.sample(list(strategies), len(strategies)):
            scores[name].append(full.compare(strategies[name]))
    groups = [item.group for item in of.items]
    summary = {name: _summary(rows, groups) for name, rows in scores.items()}
    answers = [full.f1 for full in fulls if full.f1 is not None]
    return summary, {
        "n": len(of.items),
        "nll": float(np.mean([full.nll for full in fulls])),
        "f1": float(np.mean(answers)) if answers else None,
        "ttft_s": float(np.median([full.ttft_s for full in fulls])),
        "prompt_tokens": float(np.mean([full.prompt_tokens for full in fulls])),
        **({} if of.context_tokens is None else {"context_tokens": of.context_tokens}),
    }


def _print(name: str, figures: dict[str, dict[str, Any]], full: dict[str, Any]) -> None:
    rows = [
        (
            strategy,
            f"{of['effective_ratio']:.3f}",
            f"{of['ttft_s']:.3f}",
            *(_cell(of, metric) for metric in METRICS),
        )
        for strategy, of in figures.items()
    ]
    title = (
        f"{name}: {full['n']} items, {full['prompt_tokens']:,.0f} prompt tokens, "
        f"full prefill: {full['ttft_s']:.2f} s, NLL {full['nll']:.3f}"
    )
    print_table(title, ("strategy", "rows", "TTFT s", *METRICS.values()), rows)


def _summary(rows: Sequence[dict[str, float]], groups: Sequence[str]) -> dict[str, Any]:
    """Means, 95 % intervals and what is no mean of one strategy on one set."""
    intervals = {m: interval([row[m] for row in rows], groups) for m in METRICS if m in rows[0]}
    return {
        **{metric: found["mean"] for metric, found in intervals.items()},
        "ttft_s": float(np.median([row["ttft_s"] for row in rows])),
        "effective_ratio": float(np.mean([row["effective_ratio"] for row in rows])),
        "n": len(rows),
        "ci95": {metric: [found["low"], found["high"]] for metric, found in intervals.items()},
    }


def _cell(figures: dict[str, Any], metric: str) -> str:
    if metric not in figures:
        return "-"
    low, high = figures["ci95"][metric]
    return shown({"mean": figures[metric], "low": low, "high": high})


class _Full:
    """Full prefill of one item: its greedy answer and the distributions to compare with."""

    def __init__(self, engine: Engine, item: Item, options: FidelityOptions) -> None:
        self._engine, self._item, self._options = engine, item, options
        self._gold = _gold_ids(engine, item)
        # The blocks are computed here, so that no strategy's effective ratio is charged for them.
        self._prefill(create("reuse"))
        prefilled, self.ttft_s = self._prefill(create("full"))
        self._greedy = greedy_answer(engine.model, prefilled, options.new_tokens)
        self._logprobs = engine.continuation_logprobs(prefilled, self._greedy)
        self.nll = self._nll(prefilled)
        self.f1 = self._f1(prefilled)
        self.prompt_tokens = prefilled.tokens.prompt

    def compare(self, strategy: FusionStrategy) -> dict[str, float]:
        """The metrics of a strategy on this item, its effective ratio and TTFT."""
        prefilled, ttft_s = self._prefill(strategy)
        other = self._engine.continuation_logprobs(prefilled, self._greedy)
        kl = divergence(self._logprobs, other)
        difference = self._nll(prefilled) - self.nll
        answer = self._f1(prefilled)
        return {
            "kl": float(kl.mean()),
            "kl_first": float(kl[0]),
            "dnll_mean": difference,
            "dnll_abs": abs(difference),
            **({} if answer is None else {"f1": answer}),
            "ttft_s": ttft_s,
            "effective_ratio": prefilled.effective_ratio,
        }

    def _prefill(self, strategy: FusionStrategy) -> tuple[Prefilled, float]:
        """The prompt in a cache, and the seconds that it took."""
        begun = time.perf_counter()
        prefilled = self._engine.prefill(
            self._item.question,
            passages=self._item.passages,
            strategy=strategy,
            new_tokens=max(self._options.new_tokens, len(self._gold)),
            corpus_prefix=self._options.other_prefix,
        )
        int(prefilled.logits.argmax())
        return prefilled, time.perf_counter() - begun

    def _nll(self, prefilled: Prefilled) -> float:
        """Nats a token of the gold answer."""
        logprobs = self._engine.continuation_logprobs(prefilled, self._gold)
        return -float(logprobs[torch.arange(len(self._gold)), torch.tensor(self._gold)].mean())

    def _f1(self, prefilled: Prefilled) -> float | None:
        """Of the strategy's own greedy answer; None if no answers are asked for."""
        if not self._options.answers:
            return None
        ids = greedy_answer(self._engine.model, prefilled, self._options.new_tokens)
        return f1(self._engine.model.tokenizer.decode(ids), self._item.answers)


def _gold_ids(engine: Engine, item: Item) -> list[int]:
    tokenizer = engine.model.tokenizer
    # Behind "Answer:" a model without a chat template goes on with a space.
    space = "" if tokenizer.has_chat_template else " "
    return tokenizer.encode(f"{space}{item.answers[0]}")
