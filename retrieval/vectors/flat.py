"""Exact search: every vector is looked at. 4 * dim bytes a vector."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .base import Bits, IndexKind, Matrix, Rows, selector

__all__ = ["Flat", "exact", "stored"]

_TIE_SLACK = 16
_TIE = 1e-6  # scores of unit vectors nearer than this may differ by FAISS's summation order alone


class Flat:
    """A `Structure` over FAISS's IndexFlatIP."""

    kind: ClassVar[IndexKind] = "flat"

    def __init__(self, faiss: Any, index: Any) -> None:
        self._faiss, self.index = faiss, index

    @classmethod
    def empty(cls, faiss: Any, dim: int) -> Flat:
        return cls(faiss, faiss.IndexFlatIP(dim))

    @staticmethod
    def fits(faiss: Any, index: Any) -> bool:
        """Whether an index that was read from a file is one of these."""
        return type(index) is faiss.IndexFlatIP

    def append(self, vectors: Matrix) -> None:
        self.index.add(vectors)

    def forget(self, rows: Rows, live: Bits) -> None:
        stored(self._faiss, self.index)[rows] = 0

    def nearest(self, query: Matrix, k: int, live: Bits | None, among: Rows | None) -> Rows:
        """The best `k`, ties at the boundary included."""
        return exact(self._faiss, self.index, query, k, live, among)

    def vectors(self, rows: Rows) -> Matrix:
        return stored(self._faiss, self.index)[rows]

    def is_outgrown(self) -> bool:
        return False


def exact(
    faiss: Any, index: Any, query: Matrix, k: int, live: Bits | None, among: Rows | None
) -> Rows:
    """Rows of a flat index that surely hold the best `k`, ties at the boundary included."""
    # FAISS goes through such a list alone, and through all rows for any other selector.
    wanted = selector(faiss, live, None, 0) if among is None else faiss.IDSelectorArray(among)
    parameters = faiss.SearchParameters(sel=wanted)
    size = index.ntotal if among is None else len(among)
    k = min(k, size)
    fetch = min(size, k + _TIE_SLACK)
    while True:
        scores, rows = index.search(query, fetch, params=parameters)
        if fetch == size or scores[0, k - 1] - scores[0, fetch - 1] > _TIE:
            found: Rows = rows[0][rows[0] >= 0]
            return found
        fetch = min(size, 2 * fetch)


def stored(faiss: Any, index: Any) -> Matrix:
    """The rows of a flat index themselves, `(rows, dim)`, as long as nothing is added."""
    if not index.ntotal:
        return np.empty((0, index.d), dtype=np.float32)
    rows: Matrix = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
    return rows.reshape(-1, index.d)
