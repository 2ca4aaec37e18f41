"""What the TTFT benchmark reports: from single answers to the figures of a context length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kvrag.answer import Report
from kvrag.bench.contestants import Measured
from kvrag.bench.frame import median

__all__ = ["COLUMNS", "exponents", "figures", "rows", "spans"]

COLUMNS = ("strategy", "TTFT s (median)", "range", "x faster than full", "decode ms/token")
#: The name under which the default strategy's figures stand once more.
DEFAULT = "default"


def figures(
    measured: Mapping[str, Sequence[Measured]], *, computing_all: Sequence[str], default: str
) -> dict[str, Any]:
    """Medians over the repetitions, by name.

    Args:
        measured: by name one answer a repetition, in the same order for all.
        computing_all: names that prefill whole prompts; the fastest is "full" of the speed-ups.
        default: the strategy whose load, ratio and tiers are reported.
    """
    ttft = {name: median([m.timing.ttft_s for m in of]) for name, of in measured.items()}
    decode = {name: median([1000 * m.timing.token_s for m in of]) for name, of in measured.items()}
    full = min((ttft[name] for name in computing_all), default=None)
    reports = {
        name: [m.report for m in of if m.report is not None] for name, of in measured.items()
    }
    return {
        "ttft_s": {**ttft, DEFAULT: ttft[default]},
        "ttft_range_s": {name: _range(of) for name, of in measured.items()},
        "decode_ms": {**decode, DEFAULT: decode[default]},
        "speedup_over_full": {
            name: round(full / seconds, 2) for name, seconds in ttft.items() if full is not None
        },
        "tokens_as_full": _agreement(measured),
        "spans_s": {name: spans(of) for name, of in reports.items() if of},
        "cache_state": "+".join(sorted(set().union(*(m.tiers for m in measured[default])))),
        "effective_ratio": median([report.effective_ratio for report in reports[default]]),
        "stall_s": median([report.spans.stall for report in reports[default]]),
    }


def spans(reports: Sequence[Report]) -> dict[str, float]:
    """Means of what TTFT is made of: its parts add up to it, in seconds.

    compute_loading: computing while blocks load beside it. compute: computing alone. stall: waiting
    for blocks. other: layout and the choice of the first token.
    """
    parts: dict[str, list[float]] = {
        name: [] for name in ("compute_loading", "compute", "stall", "other")
    }
    for report in reports:
        of = report.spans
        # Several reads at a time may add up to more than what there was to compute.
        hidden = min(max(0.0, of.load - of.stall), of.compute)
        parts["compute_loading"].append(hidden)
        parts["compute"].append(of.compute - hidden)
        parts["stall"].append(of.stall)
        parts["other"].append(max(0.0, report.ttft_s - of.compute - of.stall))
    return {name: statistics.fmean(seconds) for name, seconds in parts.items()}


def exponents(lengths: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """By name the slope of log TTFT against log context tokens: 1 is linear, 2 quadratic.

    Least squares over the lengths at which there are figures; none for fewer than two.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for of in lengths.values():
        for name, seconds in of["ttft_s"].items():
            points.setdefault(name, []).append((math.log(of["context_tokens"]), math.log(seconds)))
    return {
        name: round(statistics.linear_regression(*zip(*of, strict=True)).slope, 3)
        for name, of in points.items()
        if len(of) > 1
    }


def rows(of: Mapping[str, Any], skipped: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The table of `figures`, in their order, and behind them who was skipped and why."""
    shown = [
        (
            name,
            f"{of['ttft_s'][name]:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{of['speedup_over_full'].get(name, '')}",
            f"{of['decode_ms'][name]:.1f}",
        )
        for name, (low, high) in of["ttft_range_s"].items()
    ]
    return [*shown, *((name, "skipped", why, "", "") for name, why in skipped.items())]


def _range(measured: Sequence[Measured]) -> tuple[float, float]:
    seconds = [m.timing.ttft_s for m in measured]
    return min(seconds), max(seconds)


def _agreement(measured: Mapping[str, Sequence[Measured]]) -> dict[str, float]:
    """Mean number of leading tokens that are those of `full`, for who answered the same prompts."""
    reference = measured.get("full", ())
    return {
        name: statistics.fmean(
            _common(m.timing.ids, full.timing.ids) for m, full in zip(of, reference, strict=True)
        )
        for name, of in measured.items()
        if reference and of[0].same_question
    }


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(ids, others, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(others)))
