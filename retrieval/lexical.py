"""Search by words over one namespace: BM25 in SQLite's full-text index, inside the catalog's file.

What a transaction of the catalog adds or deletes is found, or not found any more, with its commit,
by every process. Nothing here is saved, and nothing can be lost.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ._lexical_table import Row, begin_table, fill, table_of
from .catalog import Catalog
from .terms import terms

__all__ = ["LexicalIndex"]

_FILL_ROWS = 512
_MOST_TERMS = 256
#: What a term in the title counts, beside one in the text.
TITLE_WEIGHT = 4.0


class LexicalIndex:
    """Chunks that share words with a question, by BM25 (k1 1.2, b 0.75), titles four times.

    BM25 as SQLite's FTS5 has it (Robertson et al., Okapi at TREC-3). Looking at a chunk takes some
    4 microseconds, so the question's commonest terms are left out as soon as the rarer ones
    together are in `budget` chunks: they would look at most of the corpus and say little. Where
    that finds fewer than `k`, all terms are asked for.

    Thread-safe; the catalog's lock is held for one statement at a time.
    """

    def __init__(self, catalog: Catalog, namespace: str, *, budget: int = 4000) -> None:
        if budget < 1:
            raise ValueError(f"budget must be at least 1, got {budget}")
        self._catalog, self._namespace, self._budget = catalog, namespace, budget
        self._lock = threading.Lock()
        self._counted: tuple[int, dict[str, int]] = (-1, {})

    def catch_up(self) -> str:
        """Put chunks that are not in the table yet into it, in small transactions.

        There are none, but for a catalog of an older release. Returns the table's name.
        """
        while True:
            with self._catalog.reading() as db:
                table = table_of(db, self._namespace)
            if table is not None:
                return table
            with self._catalog.writing() as db:
                table, filled_to = begin_table(db, self._namespace)
                rows: list[Row] = db.execute(
                    "SELECT id, title, text FROM chunks WHERE namespace = ? AND id > ? "
                    "ORDER BY id LIMIT ?",
                    (self._namespace, filled_to, _FILL_ROWS),
                ).fetchall()
                fill(db, table, self._namespace, rows)

    def search(
        self, question: str, k: int, *, allowed: npt.NDArray[np.int64] | None = None
    ) -> list[tuple[int, float]]:
        """The best `k` chunks as (chunk id, BM25), best first, equal ones in order of the id.

        Only chunks that share a term with the question, so perhaps none; of a question, the first
        256 different terms count. `allowed`: `(n,)` int64, the only chunk ids to be found.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        table = self.catch_up()
        asked = list(dict.fromkeys(terms(question)))[:_MOST_TERMS]
        rare = self._rare(table, asked)
        found = self._matches(table, rare, k, allowed)
        if len(found) < k and len(rare) < len(asked):
            found = self._matches(table, asked, k, allowed)
        return found

    def _rare(self, table: str, asked: list[str]) -> list[str]:
        """The rarest terms: as many as are together in `budget` chunks, and at least one."""
        counts = {term: self._count(table, term) for term in asked}
        kept: list[str] = []
        total = 0
        for term in sorted((t for t in asked if counts[t]), key=counts.__getitem__):
            total += counts[term]
            if kept and total > self._budget:
                break
            kept.append(term)
        return kept

    def _count(self, table: str, term: str) -> int:
        """In how many chunks a term is, as far as `budget` and one more."""
        generation = self._catalog.generation(self._namespace)
        with self._lock:
            if self._counted[0] != generation:
                self._counted = (generation, {})
            known = self._counted[1]
        if term not in known:
            with self._catalog.reading() as db:
                known[term] = db.execute(
                    f"SELECT count(*) FROM (SELECT 1 FROM {table} WHERE {table} MATCH ? LIMIT ?)",
                    (_quoted([term]), self._budget + 1),
                ).fetchone()[0]
        return known[term]

    def _matches(
        self, table: str, asked: list[str], k: int, allowed: npt.NDArray[np.int64] | None
    ) -> list[tuple[int, float]]:
        if not asked:
            return []
        with self._catalog.reading() as db:
            rows: list[Any] = db.execute(
                f"SELECT rowid, bm25({table}, ?, 1.0) AS score FROM {table} WHERE {table} MATCH ? "
                "ORDER BY score, rowid LIMIT ?",
                (TITLE_WEIGHT, _quoted(asked), k if allowed is None else -1),
            ).fetchall()
        if allowed is not None:
            inside = np.isin(np.array([row[0] for row in rows], dtype=np.int64), allowed)
            rows = [row for row, is_inside in zip(rows, inside, strict=True) if is_inside][:k]
        # FTS5's is negative, so that the best sort first.
        return [(chunk_id, -score) for chunk_id, score in rows]


def _quoted(asked: list[str]) -> str:
    """An FTS5 query for any of the terms, which hold no quotes: they are letters and digits."""
    return " OR ".join(f'"{term}"' for term in asked)
