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
#: Candidates of a search: a share of all vectors, within bounds. In dense clusters a million need
#: 1,536 of them where 128 do for a tenth of that (`kvrag bench index`, docs/retrieval.md).
_EF_EACH_MILLION, _LEAST_EF, _MOST_EF = 1536, 128, 2048
#: So many rows are gone through one by one, which takes no longer than a graph where few of those
#: that are met may be found.
_EXACT_ROWS = 150_000
_SLACK = 16


class Hnsw:
    """A `Structure` over FAISS's IndexHNSWFlat."""

    kind: ClassVar[IndexKind] = "hnsw"

    def __init__(self, faiss: Any, index: Any) -> None:
        self._faiss, self.index = faiss, index
        self._effort: int | None = None

    @classmethod
    def empty(cls, faiss: Any, dim: int) -> Hnsw:
        index = faiss.IndexHNSWFlat(dim, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
        return cls(faiss, index)

    @property
    def effort(self) -> int:
        """Candidates of a search (ef), at least; set it to have others than its size asks for."""
        wanted = self.index.ntotal * _EF_EACH_MILLION // 10**6
        return self._effort or min(max(_LEAST_EF, wanted), _MOST_EF)

    @effort.setter
    def effort(self, candidates: int | None) -> None:
        self._effort = candidates

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
