"""Chunks for a question from both indexes: filtered, ranked, fused, thinned out.

Knows the two indexes and the catalog; no model but the embedder that it is given.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .catalog import Catalog
from .embedder import Embedder
from .lexical import LexicalIndex
from .near_duplicates import Shingles, jaccard, shingles
from .ranking import marginal_relevance, reciprocal_rank
from .where import Where

__all__ = ["DenseIndex", "Found", "HybridSearch", "Match", "Rerank"]

#: Of each ranking that is fused, and of what MMR chooses from. Deeper changes the first ten little.
_DEPTH = 100
#: Of what was found, how many a reranker reads: each costs it as much as a passage's embedding.
RERANKED = 20
#: Tuned on the even questions of a pool of HotpotQA: `kvrag bench retrieval` reports the odd ones.
_WEIGHTS = {"dense": 1.0, "lexical": 1.5}
_KEPT_FILTERS = 8
_READ_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Match:
    """How a chunk was found. None: not by that index, or not among its first ones.

    Ranks begin at 1. cosine: of question and chunk. bm25: of the lexical index.
    """

    dense_rank: int | None = None
    cosine: float | None = None
    lexical_rank: int | None = None
    bm25: float | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A chunk, the score that its search ranked it by, and how it was found."""

    chunk_id: int
    score: float
    match: Match


class DenseIndex(Protocol):
    """What finds chunks by meaning: `VectorIndex`, which has the contract, or what replaces it."""

    @property
    def is_saved(self) -> bool: ...

    def __len__(self) -> int: ...

    def refresh(self) -> bool: ...

    def save(self, *, now: bool = False) -> bool: ...

    def search(
        self,
        vector: npt.NDArray[np.float32],
        k: int,
        *,
        allowed: npt.NDArray[np.int64] | None = None,
    ) -> list[tuple[int, float]]: ...


Dense = Callable[[], tuple[Embedder, DenseIndex]]
#: A question and ids of chunks to scores in the same order, larger ones better; None for a chunk
#: that was deleted since.
Rerank = Callable[[str, Sequence[int]], Sequence[float | None]]


class HybridSearch:
    """Searches one namespace. Thread-safe.

    `dense` opens embedder and vector index; a search by words alone calls it for MMR only.
    """

    def __init__(self, catalog: Catalog, namespace: str, dense: Dense) -> None:
        self._catalog, self._namespace, self._dense = catalog, namespace, dense
        self._lexical = LexicalIndex(catalog, namespace)
        self._lock = threading.Lock()
        self._filters: OrderedDict[tuple[int, str], npt.NDArray[np.int64]] = OrderedDict()

    def prepare(self) -> None:
        """Bring the lexical index up to date, which the first search does otherwise."""
        self._lexical.catch_up()

    def search(
        self,
        question: str,
        k: int,
        *,
        mode: str,
        where: Where | None = None,
        mmr: float = 1.0,
        distinct: float = 1.0,
        rerank: Rerank | None = None,
    ) -> list[Found]:
        """At most `k` chunks, best first; fewer if fewer pass the filter or share a word.

        mode: "dense", "lexical" or "hybrid". A score is the cosine similarity of a dense search,
        BM25 of a lexical one, and of a hybrid one the fused reciprocal ranks, where 1 is first in
        both. With `mmr` below 1 the order is that of maximal marginal relevance among the first
        100 or 4 k chunks, and scores stay what they were. With `distinct` below 1, of two of these
        chunks whose shingles have a larger similarity (Jaccard's), the lower-ranked is left out.
        `rerank` orders the first 20 or `k` that are left anew, by scores of its own, before MMR;
        the others are not found then.
        """
        allowed = None if where is None else self._allowed(where)
        if allowed is not None and not allowed.size:
            return []
        depth = max(_DEPTH, 4 * k)
        if mode != "hybrid" and mmr == distinct == 1:
            depth = k if rerank is None else max(RERANKED, k)
        lexical: list[tuple[int, float]] = []
        dense: list[tuple[int, float]] = []
        # Words are looked up while the question is embedded. The thread ends here: one that waited
        # for the next question would outlive whoever asks none.
        with ThreadPoolExecutor(1, "kvrag-words") as aside:
            words = partial(self._lexical.search, question, depth, allowed=allowed)
            by_words = None if mode == "dense" else aside.submit(words)
            vector = self._embedded(question) if mode != "lexical" or mmr < 1 else None
            if vector is not None and mode != "lexical":
                dense = self._index().search(vector, depth, allowed=allowed)
            if by_words is not None:
                lexical = by_words.result()
        ranked = _ranked(mode, dense, lexical)
        reranked = max(RERANKED, k)
        if distinct < 1:
            most = reranked if rerank is not None else k if mmr == 1 else len(ranked)
            ranked = self._distinct(ranked, most, distinct)
        if rerank is not None and ranked:
            ranked = _reranked(question, ranked[:reranked], rerank)
        if mmr < 1 and ranked:
            ranked = self._thinned(ranked, k, mmr)
        return self._matched(ranked[:k], dense, lexical, vector)

    def _index(self) -> DenseIndex:
        _, index = self._dense()
        index.refresh()
        return index

    def _embedded(self, question: str) -> npt.NDArray[np.float32]:
        embedder, _ = self._dense()
        return embedder.embed_query(question)

    def _allowed(self, where: Where) -> npt.NDArray[np.int64]:
        """Ids of the chunks that pass; kept while the namespace does not change."""
        key = (self._catalog.generation(self._namespace), where.text)
        with self._lock:
            if key in self._filters:
                self._filters.move_to_end(key)
                return self._filters[key]
        ids = self._catalog.chunk_ids_where(self._namespace, where)
        with self._lock:
            self._filters[key] = ids
            while len(self._filters) > _KEPT_FILTERS:
                self._filters.popitem(last=False)
        return ids

    def _distinct(
        self, ranked: list[tuple[int, float]], most: int, distinct: float
    ) -> list[tuple[int, float]]:
        """The best `most`, each without its nearly the same of lower rank."""
        kept: list[tuple[int, float]] = []
        seen: list[Shingles] = []
        for first in range(0, len(ranked), _READ_AT_ONCE):
            some = ranked[first : first + _READ_AT_ONCE]
            chunks = self._catalog.chunk([i for i, _ in some], namespace=self._namespace)
            for item, chunk in zip(some, chunks, strict=True):
                # One that was deleted since takes no place.
                own = None if chunk is None else shingles(chunk.text)
                if own is None or any(jaccard(own, other) > distinct for other in seen):
                    continue
                kept.append(item)
                seen.append(own)
                if len(kept) == most:
                    return kept
        return kept

    def _thinned(
        self, ranked: list[tuple[int, float]], k: int, mmr: float
    ) -> list[tuple[int, float]]:
        vectors = self._vectors([chunk_id for chunk_id, _ in ranked])
        # A chunk without a vector was deleted since.
        kept = [(item, row) for item, row in zip(ranked, vectors, strict=True) if row is not None]
        if not kept:
            return []
        rows = np.stack([row for _, row in kept])
        places = marginal_relevance([item[1] for item, _ in kept], rows, k, mmr)
        return [kept[place][0] for place in places]

    def _vectors(self, chunk_ids: Sequence[int]) -> list[npt.NDArray[np.float32] | None]:
        embedder, _ = self._dense()
        return self._catalog.vectors(chunk_ids, embedder.fingerprint)

    def _matched(
        self,
        ranked: list[tuple[int, float]],
        dense: list[tuple[int, float]],
        lexical: list[tuple[int, float]],
        vector: npt.NDArray[np.float32] | None,
    ) -> list[Found]:
        by_meaning = {i: (rank, score) for rank, (i, score) in enumerate(dense, start=1)}
        by_words = {i: (rank, score) for rank, (i, score) in enumerate(lexical, start=1)}
        cosines = {chunk_id: score for chunk_id, (_, score) in by_meaning.items()}
        others = [chunk_id for chunk_id, _ in ranked if chunk_id not in cosines]
        if vector is not None and others:
            for chunk_id, row in zip(others, self._vectors(others), strict=True):
                if row is not None:
                    cosines[chunk_id] = float(row.astype(np.float64) @ vector)
        return [
            Found(
                chunk_id,
                score,
                Match(
                    dense_rank=by_meaning.get(chunk_id, (None, None))[0],
                    cosine=cosines.get(chunk_id),
                    lexical_rank=by_words.get(chunk_id, (None, None))[0],
                    bm25=by_words.get(chunk_id, (None, None))[1],
                ),
            )
            for chunk_id, score in ranked
        ]


def _reranked(
    question: str, ranked: list[tuple[int, float]], rerank: Rerank
) -> list[tuple[int, float]]:
    """By the reranker's scores; equal ones stay in the order in which they were found."""
    ids = [chunk_id for chunk_id, _ in ranked]
    scored = zip(ids, rerank(question, ids), strict=True)
    kept = [(chunk_id, score) for chunk_id, score in scored if score is not None]
    return sorted(kept, key=lambda pair: -pair[1])


def _ranked(
    mode: str, dense: list[tuple[int, float]], lexical: list[tuple[int, float]]
) -> list[tuple[int, float]]:
    if mode == "dense":
        return dense
    if mode == "lexical":
        return lexical
    rankings = [[chunk_id for chunk_id, _ in ranking] for ranking in (dense, lexical)]
    return reciprocal_rank(rankings, list(_WEIGHTS.values()))
