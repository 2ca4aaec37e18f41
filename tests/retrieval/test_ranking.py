from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvrag.retrieval.ranking import RANK_CONSTANT, marginal_relevance, reciprocal_rank

from .helpers import unit_vectors


def test_reciprocal_ranks_add_up():
    fused = dict(reciprocal_rank([[7, 8], [8, 9]], [1.0, 2.0]))
    k = RANK_CONSTANT
    whole = 3 / (k + 1)
    assert fused == pytest.approx(
        {
            7: 1 / (k + 1) / whole,
            8: (1 / (k + 2) + 2 / (k + 1)) / whole,
            9: 2 / (k + 2) / whole,
        }
    )


def test_first_everywhere_is_1_and_equal_scores_come_in_order_of_ids():
    assert reciprocal_rank([[3, 1], [3, 2]], [1.0, 1.0])[0] == (3, 1.0)
    assert [i for i, _ in reciprocal_rank([[5], [4]], [1.0, 1.0])] == [4, 5]
    assert reciprocal_rank([[], []], [1.0, 1.0]) == []
    assert [i for i, _ in reciprocal_rank([[], [2, 1]], [1.0, 1.5])] == [2, 1]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_marginal_relevance_against_the_formula(weight):
    rng = np.random.default_rng(3)
    vectors = unit_vectors(3, 12)
    scores = rng.random(12)
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    chosen: list[int] = []
    for _ in range(6):
        rest = [i for i in range(12) if i not in chosen]
        chosen.append(
            max(
                rest,
                key=lambda i: (
                    weight * scaled[i]
                    - (1 - weight) * max((vectors[i] @ vectors[j] for j in chosen), default=0.0)
                ),
            )
        )
    assert marginal_relevance(scores, vectors, 6, weight) == chosen


def test_relevance_alone_leaves_the_order_and_copies_are_passed_over():
    vectors = unit_vectors(1, 3)[[0, 0, 1, 2]]
    assert marginal_relevance([4.0, 3.0, 2.0, 1.0], vectors, 4, 1.0) == [0, 1, 2, 3]
    assert 1 not in marginal_relevance([4.0, 3.9, 2.0, 1.0], vectors, 3, 0.3)
    assert marginal_relevance([], vectors[:0], 3, 0.5) == []
    for count in itertools.count(1):
        assert len(marginal_relevance([1.0, 1.0], vectors[:2], count, 0.5)) == min(count, 2)
        if count == 4:
            break
