"""Approximate search along a graph of neighbours, with every vector kept as it is.

HNSW (Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using
Hierarchical Navigable Small World graphs", TPAMI 2020). 4 * dim + 272 bytes a vector.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .base import Bits, IndexKind, Matrix, Rows, selector
from .flat import exact, stored

__all__ = ["Hnsw"]

_NEIGHBOURS = 32  # M of the paper
_EF_CONSTRUCTION = 100
#: Candidates of a search. As many as a million vectors in dense clusters need, where 128 do for a
#: tenth of that: `kvrag bench index` tells what recall and time they give.
_EF_SEARCH = 1536
#: So many rows are gone through one by one, which takes no longer than a graph where few of those
#: that are met may be found.
_EXACT_ROWS = 150_000
_SLACK = 16


class Hnsw:
    """A `Structure` over FAISS's IndexHNSWFlat. `effort`: ef of a search, at least."""

    kind: ClassVar[IndexKind] = "hnsw"

    def __init__(self, faiss: Any, index: Any) -> None:
        self._faiss, self.index = faiss, index
        self.effort = _EF_SEARCH

    @classmethod
    def empty(cls, faiss: Any, dim: int) -> Hnsw:
        index = faiss.IndexHNSWFlat(dim, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        return cls(faiss, index)

    @staticmethod
    def fits(faiss: Any, index: Any) -> bool:
        """Whether an index that was read from a file is one of these."""
        is_one = type(index) is faiss.IndexHNSWFlat
        return is_one and index.metric_type == faiss.METRIC_INNER_PRODUCT

    def append(self, vectors: Matrix) -> None:
        self.index.add(vectors)

    def forget(self, rows: Rows, live: Bits) -> None:
        """Each row takes over the vector of a live neighbour: the graph still leads through it."""
        vectors = stored(self._faiss, self._storage())
        is_live = np.unpackbits(live, count=len(vectors), bitorder="little").astype(bool)
        for row in rows.tolist():
            near = self._neighbours(row)
            near = near[is_live[near]]
            vectors[row] = vectors[near[0]] if near.size else 0

    def nearest(self, query: Matrix, k: int, live: Bits | None, among: Rows | None) -> Rows:
        if among is not None and len(among) <= _EXACT_ROWS:
            return exact(self._faiss, self._storage(), query, k, None, among)
        size = self.index.ntotal
        count = min(size, k + _SLACK)
        # Of what a search looks at, the same share is of rows that may be found.
        widened = 1 if among is None else size // len(among)
        parameters = self._faiss.SearchParametersHNSW(
            efSearch=max(self.effort, count) * widened,
            sel=selector(self._faiss, live, among, size),
        )
        _, rows = self.index.search(query, count, params=parameters)
        found: Rows = rows[0][rows[0] >= 0]
        return found

    def vectors(self, rows: Rows) -> Matrix:
        return stored(self._faiss, self._storage())[rows]

    def is_outgrown(self) -> bool:
        return False

    def _storage(self) -> Any:
        return self._faiss.downcast_index(self.index.storage)

    def _neighbours(self, row: int) -> Rows:
        """Those in the lowest layer, nearest first."""
        hnsw = self.index.hnsw
        first, count = hnsw.offsets.at(row), hnsw.nb_neighbors(0)
        all_layers = self._faiss.rev_swig_ptr(hnsw.neighbors.data(), first + count)
        near: Rows = all_layers[first : first + count].astype(np.int64)
        return near[near >= 0]
