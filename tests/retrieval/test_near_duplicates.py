"""Groups of texts that are nearly the same: those that comparing every pair finds."""

from __future__ import annotations

import random

import pytest

from kvrag.retrieval.near_duplicates import jaccard, near_duplicates, shingles


def by_every_pair(texts, threshold):
    sets = {number: shingles(text) for number, text in texts}
    groups = [{number} for number, found in sets.items() if found]
    for one in sets:
        for other in sets:
            if one < other and jaccard(sets[one], sets[other]) >= threshold:
                first = next(group for group in groups if one in group)
                second = next(group for group in groups if other in group)
                if first is not second:
                    first |= second
                    groups.remove(second)
    return sorted(sorted(group) for group in groups if len(group) > 1)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_what_every_pair_says(threshold):
    drawn = random.Random(0)
    texts = []
    for number in range(150):
        if texts and number % 3:
            words = drawn.choice(texts)[1].split()
            for _ in range(drawn.randrange(4)):
                words[drawn.randrange(len(words))] = drawn.choice("abcdefgh")
        else:
            words = drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randrange(1, 40))
        texts.append((number, " ".join(words)))
    found = near_duplicates(texts, threshold)
    assert found == by_every_pair(texts, threshold)
    assert found


def test_similarity_is_that_of_runs_of_words():
    assert jaccard(shingles("The lamp, the LAMP!"), shingles("the lamp the lamp")) == 1
    assert jaccard(shingles("a b c d"), shingles("a b c e")) == pytest.approx(1 / 3)
    assert jaccard(shingles("a b"), shingles("a b")) == 1
    assert jaccard(shingles("a b"), shingles("b a")) == 0
    assert jaccard(shingles("?!"), shingles("?!")) == 0
    assert near_duplicates([(1, "?!"), (2, "?!"), (3, "a"), (9, "A")], 0.5) == [[3, 9]]


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_thresholds_that_make_no_sense(threshold):
    with pytest.raises(ValueError, match="threshold"):
        near_duplicates([], threshold)
