"""What the kinds of index have in common: rows of vectors that are searched, added and forgotten.

A row is a place, counted from 0 in the order of addition. Which chunk it belongs to, and whether
that was deleted, is none of a structure's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Bits", "IndexKind", "Matrix", "Rows", "Source", "Structure", "selector"]

IndexKind = Literal["flat", "hnsw", "ivfpq"]

Matrix = npt.NDArray[np.float32]  # (n, dim)
Rows = npt.NDArray[np.int64]  # (n,)
Bits = npt.NDArray[np.uint8]  # (ceil(rows / 8),), the lowest bit first


class Structure(Protocol):
    """Vectors searched by inner product. Not thread-safe but for `nearest` and `vectors`.

    kind:  its name
    index: the FAISS index
    """

    kind: ClassVar[IndexKind]
    index: Any

    def append(self, vectors: Matrix) -> None:
        """Add rows behind the last one."""
        ...

    def forget(self, rows: Rows, live: Bits) -> None:
        """Overwrite or drop rows, which nobody will ask for again. live: those that are left."""
        ...

    def nearest(self, query: Matrix, k: int, live: Bits | None, among: Rows | None) -> Rows:
        """Rows that hold the best `k`, or most of them, and some more; in any order.

        query: (1, dim)
        live:  the rows to look at; None for all
        among: the only ones of these, ascending, at least one; None for all
        """
        ...

    def vectors(self, rows: Rows) -> Matrix | None:
        """The exact vectors; None for a structure that does not hold them."""
        ...

    def is_outgrown(self) -> bool:
        """Whether so much was added that it should be made anew."""
        ...


class Source(Protocol):
    """Where a structure is made from.

    count:   vectors, about
    sample:  (at most so many, dim), drawn from all of them
    batches: all of them
    """

    count: int

    def sample(self, count: int) -> Matrix: ...

    def batches(self) -> Iterator[Matrix]: ...


def selector(faiss: Any, live: Bits | None, among: Rows | None, size: int) -> Any:
    """What tells FAISS to look at these rows of `size` alone; None for all of them.

    To be given to a constructor of search parameters, which holds it.
    """
    if among is not None:
        mask = np.zeros(size, dtype=bool)
        mask[among] = True
        live = np.packbits(mask, bitorder="little")
    return None if live is None else faiss.IDSelectorBitmap(live)
