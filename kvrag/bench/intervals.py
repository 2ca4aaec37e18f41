"""Means with 95 % bootstrap intervals over groups: items of a group share passages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["interval", "shown"]

_RESAMPLES = 2000


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
