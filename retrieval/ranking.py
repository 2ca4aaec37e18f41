"""Rankings put together, and thinned out: reciprocal rank fusion and maximal marginal relevance.

Knows nothing of what is ranked: an item is its id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["RANK_CONSTANT", "marginal_relevance", "reciprocal_rank"]

#: k of the paper: the larger it is, the less the first ranks stand out. The paper's 60 was tuned on
#: many rankings of 1,000; with two, 10 is better (docs/retrieval.md).
RANK_CONSTANT = 10


def reciprocal_rank(
    rankings: Sequence[Sequence[int]], weights: Sequence[float]
) -> list[tuple[int, float]]:
    """Items of all rankings as (id, score), best first; equal scores in order of the id.

    score = sum of weight / (k + rank) over the rankings that have the item, ranks from 1, divided
    by its largest possible value: 1 is first in every ranking. Reciprocal rank fusion (Cormack,
    Clarke and Buettcher, SIGIR 2009, section 2), with a weight for each ranking.
    """
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + weight / (RANK_CONSTANT + rank)
    largest = sum(weights) / (RANK_CONSTANT + 1)
    ordered = sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
    return [(item, score / largest) for item, score in ordered]


def marginal_relevance(
    scores: Sequence[float], vectors: npt.NDArray[np.float32], k: int, weight: float
) -> list[int]:
    """Places of the `k` items chosen one by one, each by its relevance and its novelty.

    Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998, section 2): the next item has
    the largest `weight * relevance - (1 - weight) * similarity`, similarity being the largest inner
    product with an item chosen before. Relevance is `scores` scaled to 0 … 1 among these items, so
    that scores of any ranking do. Equal ones come in the given order.

    scores:  (n,), larger is better
    vectors: (n, dim) float32, of length 1
    weight:  0 (novelty alone) to 1 (relevance alone)
    """
    relevance = np.asarray(scores, dtype=np.float64)
    if not relevance.size:
        return []
    spread = relevance.max() - relevance.min()
    relevance = (relevance - relevance.min()) / spread if spread else np.ones_like(relevance)
    nearest = np.full(len(relevance), -np.inf)
    chosen: list[int] = []
    open_ = np.ones(len(relevance), dtype=bool)
    while len(chosen) < min(k, len(relevance)):
        worth = weight * relevance
        if chosen:
            worth = worth - (1 - weight) * nearest
        place = int(np.argmax(np.where(open_, worth, -np.inf)))
        chosen.append(place)
        open_[place] = False
        nearest = np.maximum(nearest, vectors @ vectors[place])
    return chosen
