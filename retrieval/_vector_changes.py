"""The catalog's record of which chunks' vectors came and went: what an index has to look at again.

A row says that vectors of the chunks `first_chunk` … `last_chunk` were stored or deleted with the
change that led to `generation`. It names chunks alone, which need not exist any more, and no text.
Changes that are older than a million or so are forgotten.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LARGEST_STEP", "SCHEMA", "VectorChanges", "changed_ranges", "is_known", "record"]

# The state of a catalog that comes from an older schema is one to begin at.
SCHEMA = """
CREATE TABLE vector_changes (
    namespace TEXT NOT NULL, generation INTEGER NOT NULL,
    first_chunk INTEGER NOT NULL, last_chunk INTEGER NOT NULL,
    PRIMARY KEY (namespace, generation, first_chunk)
) WITHOUT ROWID;
INSERT INTO vector_changes SELECT namespace, generation, 0, -1 FROM namespaces;
"""

#: A generation is larger than the one before by 1 to so much.
LARGEST_STEP = 1 << 20

_KEPT = 1_000_000 * LARGEST_STEP // 2
_RANGE_CHUNKS = 1024  # so that whoever reads the vectors of one row reads a bearable number


@dataclass(frozen=True, slots=True)
class VectorChanges:
    """What a vector index has to take over, all of one state of the catalog.

    generation: of that state
    ranges:     (first, last) chunk whose vectors were stored or deleted
    ids:        (n,) int64, the chunks of these ranges that have a vector now
    vectors:    (n, dim) float32, theirs
    cursor:     where the next changes begin
    is_last:    whether there were no more
    """

    generation: int
    ranges: Sequence[tuple[int, int]]
    ids: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]
    cursor: tuple[int, int]
    is_last: bool


def record(db: sqlite3.Connection, namespace: str, generation: int, ids: Iterable[int]) -> None:
    """Say that the change to `generation` was one of these chunks' vectors. In its transaction."""
    rows = [(namespace, generation, first, last) for first, last in _ranges(ids)]
    db.executemany(
        "INSERT INTO vector_changes VALUES (?, ?, ?, ?)", rows or [(namespace, generation, 0, -1)]
    )
    db.execute(
        "DELETE FROM vector_changes WHERE namespace = ? AND generation < ?",
        (namespace, generation - _KEPT),
    )


def is_known(db: sqlite3.Connection, namespace: str, generation: int) -> bool:
    """Whether the namespace was at that generation once, and all that came since is on record."""
    if not generation:  # the state before the first change, of which there is no row
        row = db.execute(
            "SELECT 1 FROM namespaces WHERE namespace = ? AND generation >= ?", (namespace, _KEPT)
        ).fetchone()
        return row is None
    row = db.execute(
        "SELECT 1 FROM vector_changes WHERE namespace = ? AND generation = ? LIMIT 1",
        (namespace, generation),
    ).fetchone()
    return row is not None


def changed_ranges(
    db: sqlite3.Connection, namespace: str, after: tuple[int, int], limit: int
) -> list[tuple[int, int, int]]:
    """At most `limit` rows (generation, first chunk, last chunk) behind (generation, first)."""
    rows: list[tuple[int, int, int]] = db.execute(
        "SELECT generation, first_chunk, last_chunk FROM vector_changes "
        "WHERE namespace = ? AND (generation, first_chunk) > (?, ?) "
        "ORDER BY generation, first_chunk LIMIT ?",
        (namespace, *after, limit),
    ).fetchall()
    return rows


def _ranges(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of ids that follow one another, none longer than `_RANGE_CHUNKS`."""
    runs: list[tuple[int, int]] = []
    for chunk_id in sorted(ids):
        if runs and chunk_id == runs[-1][1] + 1 and chunk_id - runs[-1][0] < _RANGE_CHUNKS:
            runs[-1] = (runs[-1][0], chunk_id)
        else:
            runs.append((chunk_id, chunk_id))
    return runs
