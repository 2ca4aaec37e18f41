"""How near a strategy's output is to full prefill's, item by item on the same prompts.

KL divergence of the next-token distributions along full prefill's own greedy answer; the negative
log-likelihood of the gold answer: its paired difference and, since a strategy may beat full prefill
by chance, the mean of the differences' absolute values; and F1 of each strategy's own greedy
answer. Intervals are bootstrapped over groups of items that share passages.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track

from kvrag.bench.frame import print_environment, print_json, print_table
from kvrag.bench.overlap import f1
from kvrag.bench.plots import check_plotting, plot_frontier
from kvrag.engine import Engine
from kvrag.errors import InputError
from kvrag.fusion import FusionStrategy, create
from kvrag.generation.decode import decode
from kvrag.generation.params import GenerationParams
from kvrag.models.source import Model
from kvrag.prefill import Prefilled

__all__ = [
    "STRATEGIES",
    "FidelityOptions",
    "Item",
    "divergence",
    "greedy_answer",
    "interval",
    "load_items",
    "run",
    "shown",
]

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
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Item:
    """A question with its passages and gold answers; items of a group share passages."""

    id: str
    group: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class FidelityOptions:
    """items drawn, which half of the groups, strategies as `create` takes them.

    answers: whether every strategy also writes its answer, for F1. other_prefix: the text that
    blocks are computed behind in the place of the prompt's own prefix, so that the two differ.
    """

    items: int = 100
    half: Literal["even", "odd", "all"] = "odd"
    strategies: tuple[str, ...] = STRATEGIES
    new_tokens: int = 32
    answers: bool = False
    other_prefix: str | None = None
    plot: Path | None = None
    seed: int = 0


def load_items(path: Path, options: FidelityOptions) -> list[Item]:
    """Items of a JSONL file (`id, question, answers, passages`, perhaps `group`), drawn at random.

    Even and odd are by group where the file has groups, by line elsewhere.

    Raises:
        InputError: the file cannot be read, or a line lacks a field.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            items = [_item(index, json.loads(line)) for index, line in enumerate(lines)]
    except OSError as exc:
        raise InputError(f"evaluation data {path} cannot be read: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError, IndexError) as exc:
        raise InputError(f"evaluation data {path} has a line of another form: {exc!r}") from exc
    order = {group: place for place, group in enumerate(dict.fromkeys(i.group for i in items))}
    parities = {"even": (0,), "odd": (1,), "all": (0, 1)}[options.half]
    chosen = [item for item in items if order[item.group] % 2 in parities]
    random.Random(options.seed).shuffle(chosen)
    return chosen[: options.items]


def run(engine: Engine, paths: Sequence[Path], options: FidelityOptions) -> dict[str, Any]:
    """Measure, print a table a set and the JSON line (see docs/benchmarks.md), and return it."""
    strategies = {name: create(name) for name in options.strategies}
    if options.plot is not None:
        check_plotting()
    print_environment()
    sets: dict[str, dict[str, dict[str, Any]]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for path in paths:
        sets[path.stem], facts[path.stem] = _set(engine, path, strategies, options)
        rows = [
            (
                name,
                f"{of['effective_ratio']:.3f}",
                f"{of['ttft_s']:.3f}",
                *(_cell(of, metric) for metric in METRICS),
            )
            for name, of in sets[path.stem].items()
        ]
        columns = ("strategy", "rows", "TTFT s", *METRICS.values())
        full = facts[path.stem]
        title = (
            f"{path.stem}: {full['n']} items, full prefill: {full['ttft_s']:.2f} s, "
            f"NLL {full['nll']:.3f}"
        )
        print_table(title, columns, rows)
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


def _set(
    engine: Engine, path: Path, strategies: dict[str, FusionStrategy], options: FidelityOptions
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """A set's figures by strategy, and those of full prefill."""
    items = load_items(path, options)
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in strategies}
    fulls = []
    rng = random.Random(options.seed)
    for item in track(items, description=path.stem, transient=True):
        full = _Full(engine, item, options)
        fulls.append(full)
        # In another order each time: nobody always runs on warm caches.
        for name in rng.sample(list(strategies), len(strategies)):
            scores[name].append(full.compare(strategies[name]))
    groups = [item.group for item in items]
    summary = {name: _summary(rows, groups) for name, rows in scores.items()}
    answers = [full.f1 for full in fulls if full.f1 is not None]
    return summary, {
        "n": len(items),
        "nll": float(np.mean([full.nll for full in fulls])),
        "f1": float(np.mean(answers)) if answers else None,
        "ttft_s": float(np.median([full.ttft_s for full in fulls])),
        "prompt_tokens": float(np.mean([full.prompt_tokens for full in fulls])),
    }


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


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL divergence of `q` from `p`, log probabilities (n, vocab): (n,), in nats."""
    return (p.exp() * (p - q)).sum(dim=-1)


def greedy_answer(model: Model, prefilled: Prefilled, new_tokens: int) -> list[int]:
    """The greedy continuation, at least one token; the cache is left as it was."""
    params = GenerationParams(max_tokens=new_tokens)
    steps = decode(model, prefilled.cache, prefilled.logits, params)
    greedy = [step.token_id for step in steps if step.token_id is not None]
    prefilled.cache.truncate(prefilled.prompt.length)
    # An answer that ends at once still has its first distribution to compare.
    return greedy or [int(prefilled.logits.argmax())]


class _Full:
    """Full prefill of one item: its greedy answer and the distributions to compare with."""

    def __init__(self, engine: Engine, item: Item, options: FidelityOptions) -> None:
        self._engine, self._item, self._options = engine, item, options
        tokenizer = engine.model.tokenizer
        # Behind "Answer:" a model without a chat template goes on with a space.
        space = "" if tokenizer.has_chat_template else " "
        self._gold = tokenizer.encode(f"{space}{item.answers[0]}")
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


def _item(index: int, line: dict[str, Any]) -> Item:
    return Item(
        id=str(line["id"]),
        group=str(line.get("group", index)),
        question=line["question"],
        answers=(line["answers"][0], *line["answers"][1:]),
        passages=tuple({"title": p["title"], "text": p["text"]} for p in line["passages"]),
    )


def interval(values: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """Mean with a 95 % percentile bootstrap over groups."""
    by_group: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    sums = np.array([sum(group) for group in by_group.values()])
    counts = np.array([len(group) for group in by_group.values()])
    drawn = np.random.default_rng(0).integers(len(sums), size=(_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


def shown(mean: dict[str, float]) -> str:
    """`mean [low, high]` for a table."""
    return f"{mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
