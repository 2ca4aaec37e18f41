"""How near a strategy's output is to full prefill's, item by item on the same prompts.

KL divergence of the next-token distributions along full prefill's own greedy answer, and the
negative log-likelihood of the gold answer: its paired difference and, since a strategy may beat
full prefill by chance, the mean of the differences' absolute values. Intervals are bootstrapped
over groups of items that share passages.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track

from kvrag.bench.controls import NearestBlend, RandomBlend
from kvrag.bench.frame import show
from kvrag.engine import Engine
from kvrag.errors import InputError
from kvrag.fusion import FusionStrategy, create
from kvrag.generation.decode import decode
from kvrag.generation.params import GenerationParams
from kvrag.models.source import Model
from kvrag.prefill import Prefilled

__all__ = [
    "FidelityOptions",
    "Item",
    "divergence",
    "greedy_answer",
    "interval",
    "load_items",
    "run",
    "shown",
]

METRICS = ("kl", "kl_first", "nll", "nll_difference", "nll_abs_difference")
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Item:
    """A question with its passages and gold answer; items of a group share passages."""

    id: str
    group: str
    question: str
    answer: str
    passages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class FidelityOptions:
    """items drawn, which half of the groups, ratios of the selecting strategies."""

    items: int = 100
    half: Literal["even", "odd", "all"] = "odd"
    ratios: tuple[float, ...] = (0.15,)
    new_tokens: int = 32
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


def run(engine: Engine, path: Path, options: FidelityOptions) -> dict[str, Any]:
    """Measure, print and return means with 95 % intervals (see the last line's JSON)."""
    items = load_items(path, options)
    strategies = _strategies(options)
    scores: dict[str, dict[str, list[float]]] = {
        name: {metric: [] for metric in METRICS} for name in strategies
    }
    ratios: dict[str, list[float]] = {name: [] for name in strategies}
    full_nll, tokens = [], []
    for item in track(items, description=path.stem, transient=True):
        full = _Full(engine, item, options.new_tokens)
        full_nll.append(full.nll)
        tokens.append(full.context_tokens)
        for name, strategy in strategies.items():
            measured, ratio = full.compare(strategy)
            ratios[name].append(ratio)
            for metric, value in measured.items():
                scores[name][metric].append(value)
    groups = [item.group for item in items]
    summary = {
        name: {m: interval(values, groups) for m, values in by_metric.items()}
        for name, by_metric in scores.items()
    }
    full_interval = interval(full_nll, groups)
    result = {
        "benchmark": "fidelity",
        "data": path.stem,
        "items": len(items),
        "half": options.half,
        "context_tokens": float(np.mean(tokens)),
        "full_nll": full_interval,
        "strategies": summary,
        "effective_ratio": {name: float(np.mean(values)) for name, values in ratios.items()},
        "dtype": engine.settings.dtype,
        "codec": engine.settings.codec,
        "model": engine.settings.model,
    }
    rows = [
        (name, f"{np.mean(ratios[name]):.3f}", *(shown(by[metric]) for metric in METRICS))
        for name, by in summary.items()
    ]
    columns = ("strategy", "rows", "KL", "KL first", "NLL", "ΔNLL", "|ΔNLL|")
    title = f"{path.stem}: {len(items)} items, full prefill's NLL {shown(full_interval)}"
    show(title, columns, rows, result)
    return result


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

    def __init__(self, engine: Engine, item: Item, new_tokens: int) -> None:
        self._engine, self._item, self._new_tokens = engine, item, new_tokens
        tokenizer = engine.model.tokenizer
        # Behind "Answer:" a model without a chat template goes on with a space.
        self._gold = tokenizer.encode(f"{'' if tokenizer.has_chat_template else ' '}{item.answer}")
        # The blocks are computed here, so that no strategy's effective ratio is charged for them.
        self._prefill(create("reuse"))
        prefilled = self._prefill(create("full"))
        self._greedy = greedy_answer(engine.model, prefilled, new_tokens)
        self._logprobs = engine.continuation_logprobs(prefilled, self._greedy)
        self.nll = self._nll(prefilled)
        self.context_tokens = prefilled.tokens.prompt

    def compare(self, strategy: FusionStrategy) -> tuple[dict[str, float], float]:
        """The metrics of a strategy on this item, and its effective ratio."""
        prefilled = self._prefill(strategy)
        other = self._engine.continuation_logprobs(prefilled, self._greedy)
        kl = divergence(self._logprobs, other)
        nll = self._nll(prefilled)
        measured = {
            "kl": float(kl.mean()),
            "kl_first": float(kl[0]),
            "nll": nll,
            "nll_difference": nll - self.nll,
            "nll_abs_difference": abs(nll - self.nll),
        }
        return measured, prefilled.effective_ratio

    def _prefill(self, strategy: FusionStrategy) -> Prefilled:
        return self._engine.prefill(
            self._item.question,
            passages=self._item.passages,
            strategy=strategy,
            new_tokens=max(self._new_tokens, len(self._gold)),
        )

    def _nll(self, prefilled: Prefilled) -> float:
        """Nats a token of the gold answer."""
        logprobs = self._engine.continuation_logprobs(prefilled, self._gold)
        return -float(logprobs[torch.arange(len(self._gold)), torch.tensor(self._gold)].mean())


def _strategies(options: FidelityOptions) -> dict[str, FusionStrategy]:
    made: dict[str, FusionStrategy] = {"reuse": create("reuse")}
    for ratio in options.ratios:
        made[f"random {ratio:g}"] = RandomBlend(ratio=ratio)
        made[f"nearest {ratio:g}"] = NearestBlend(ratio=ratio)
        made[f"cacheblend {ratio:g}"] = create("cacheblend", ratio)
    return made


def _item(index: int, line: dict[str, Any]) -> Item:
    return Item(
        id=str(line["id"]),
        group=str(line.get("group", index)),
        question=line["question"],
        answer=line["answers"][0],
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
