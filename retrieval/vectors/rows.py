"""Which chunk a row of a structure belongs to, and which rows are dead: their chunk was deleted."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt

from .base import Bits, Rows

__all__ = ["ChunkRows"]

Ids = npt.NDArray[np.int64]  # (n,) chunk ids


class ChunkRows:
    """Chunk ids by row. 9 bytes a row. Not thread-safe, but for reading.

    A file holds a dead row's id as `-1 - id`, so that a row is known again whatever it is.
    """

    def __init__(self, ids: Ids, dead: npt.NDArray[np.bool_]) -> None:
        """Use `of` or `from_file`."""
        self._ids, self._dead = ids, dead
        self._order: Rows | None = None
        self._live: Bits | None = None
        self.num_dead = int(dead.sum())
        self._sort()

    @classmethod
    def of(cls, ids: Ids) -> Self:
        """Live rows of these chunks, all different."""
        return cls(np.asarray(ids, dtype=np.int64), np.zeros(len(ids), dtype=bool))

    @classmethod
    def from_file(cls, numbers: Ids) -> Self:
        dead = numbers < 0
        return cls(np.where(dead, -1 - numbers, numbers), dead)

    def to_file(self) -> Ids:
        return np.where(self._dead, -1 - self._ids, self._ids)

    def __len__(self) -> int:
        """Rows, dead ones included."""
        return len(self._ids)

    @property
    def num_live(self) -> int:
        return len(self._ids) - self.num_dead

    @property
    def live(self) -> Bits | None:
        """The live rows as bits; None if all are."""
        return self._live

    def ids(self, rows: Rows) -> Ids:
        chunk_ids: Ids = self._ids[rows]
        return chunk_ids

    def find(self, ids: Ids) -> Rows:
        """The live rows of those chunks that have one, ascending."""
        by_id = self._ids if self._order is None else self._ids[self._order]
        # Of several rows of one chunk, all but the last are dead.
        places = np.searchsorted(by_id, ids, side="right") - 1
        places = places[np.take(by_id, places, mode="clip") == ids] if len(by_id) else places[:0]
        rows = places if self._order is None else self._order[places]
        return np.unique(rows[~self._dead[rows]])

    def between(self, first: int, last: int) -> Rows:
        """The live rows of the chunks `first` … `last`, in order of the id."""
        by_id = self._ids if self._order is None else self._ids[self._order]
        start, end = np.searchsorted(by_id, (first, last + 1))
        rows = np.arange(start, end) if self._order is None else self._order[start:end]
        return rows[~self._dead[rows]]

    def append(self, ids: Ids) -> None:
        self._ids = np.concatenate([self._ids, ids])
        self._dead = np.concatenate([self._dead, np.zeros(len(ids), dtype=bool)])
        self._sort()

    def kill(self, rows: Rows) -> Bits:
        """Rows that were live are dead from now on. Returns the live ones."""
        self._dead[rows] = True
        self.num_dead += len(rows)
        return self._pack()

    def _sort(self) -> None:
        # Ids come in ascending order, but for those of chunks whose vectors are made late.
        ascending = bool((self._ids[1:] > self._ids[:-1]).all())
        self._order = None if ascending else np.argsort(self._ids, kind="stable")
        self._pack()

    def _pack(self) -> Bits:
        bits = np.packbits(~self._dead, bitorder="little")
        self._live = bits if self.num_dead else None
        return bits
