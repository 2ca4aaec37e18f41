"""Texts that are nearly the same, by the runs of words that they have in common.

Similarity is Jaccard's over the sets of their shingles (Broder, On the resemblance and containment
of documents, 1997): 1 is the same words in the same order; a changed word costs three shingles.
Knows nothing of chunks but ids.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil

from .terms import terms

__all__ = ["Shingles", "jaccard", "near_duplicates", "shingles"]

_WORDS = 3
#: Hashes of shingles, comparable within one process.
Shingles = frozenset[int]


def shingles(text: str) -> Shingles:
    """All runs of three words; of a shorter text, the one that it is. None of one without words."""
    words = terms(text)
    if not words:
        return frozenset()
    runs = range(max(1, len(words) - _WORDS + 1))
    return frozenset(hash(tuple(words[first : first + _WORDS])) for first in runs)


def jaccard(one: Shingles, other: Shingles) -> float:
    """Common shingles as a part of all; 0 if there are none."""
    common = len(one & other)
    return common / (len(one) + len(other) - common) if common else 0.0


def near_duplicates(texts: Iterable[tuple[int, str]], threshold: float) -> list[list[int]]:
    """Groups of ids whose texts are linked by pairs of at least that similarity, ascending.

    threshold: above 0, up to 1. Exact: two sets that are that similar have one of their rarest
    shingles in common, of so many that the others cannot make up for it (prefix filter; Bayardo, Ma
    and Srikant, Scaling up all pairs similarity search, WWW 2007), so only such pairs are compared.
    Memory holds all shingles, some 70 bytes each. Raises ValueError for another threshold.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold must be above 0 and at most 1, got {threshold}")
    alike: dict[Shingles, list[int]] = {}
    for number, text in texts:
        found = shingles(text)
        if found:
            alike.setdefault(found, []).append(number)
    sets = list(alike)
    leaders = list(range(len(sets)))
    for one, other in _pairs(sets, threshold):
        first, second = _leader(leaders, one), _leader(leaders, other)
        if first != second and jaccard(sets[one], sets[other]) >= threshold:
            leaders[second] = first
    groups: dict[int, list[int]] = defaultdict(list)
    for place, numbers in enumerate(alike.values()):
        groups[_leader(leaders, place)] += numbers
    return sorted(sorted(numbers) for numbers in groups.values() if len(numbers) > 1)


def _pairs(sets: Sequence[Shingles], threshold: float) -> Iterator[tuple[int, int]]:
    """Places of the pairs that may be similar enough."""
    counts: Mapping[int, int] = Counter(one for found in sets for one in found)
    begun_by: dict[int, list[int]] = defaultdict(list)
    # Shorter ones first: a set is only compared with those that are long enough.
    for place in sorted(range(len(sets)), key=lambda at: len(sets[at])):
        found = sets[place]
        least = ceil(threshold * len(found) - 1e-9)
        rarest = sorted(found, key=lambda one: (counts[one], one))[: len(found) - least + 1]
        met = {
            other for one in rarest for other in begun_by.get(one, ()) if len(sets[other]) >= least
        }
        yield from ((other, place) for other in met)
        for one in rarest:
            if counts[one] > 1:
                begun_by[one].append(place)


def _leader(leaders: list[int], place: int) -> int:
    while leaders[place] != place:
        leaders[place] = leaders[leaders[place]]
        place = leaders[place]
    return place
