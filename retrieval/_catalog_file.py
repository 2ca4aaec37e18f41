"""The catalog's file: one connection behind one lock, transactions, and rows in batches.

Knows nothing of documents.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from ._sqlite import connect, empty_log, translated

__all__ = ["BATCH_ROWS", "CatalogFile", "check_name"]

BATCH_ROWS = 512  # also under SQLite's oldest limit of 999 values in a statement
_LONGEST_NAME = 512


class CatalogFile:
    """Thread-safe: one connection behind one lock, held for one statement or transaction."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        """Use `Catalog.open`."""
        self._db = db
        self._path = path
        self._lock = threading.RLock()
        self._log_has_deleted = False

    @classmethod
    def open(cls, path: Path | str, *, busy_timeout_s: float = 30.0) -> Self:
        """Open the catalog at `path`, creating file and folder if needed.

        Raises CatalogError for a file that is damaged, foreign, or of a newer schema.
        """
        return cls(connect(Path(path), busy_timeout_s), Path(path))

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        with self._lock, translated(self._path):
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """Where the catalog is."""
        return self._path

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, committed at the end of the block, rolled back by any exception.

        For this room alone. Inside another one it is a part of that.
        """
        with self._lock, translated(self._path):
            inside = self._db.in_transaction  # of this thread, which has the lock
            if inside:
                yield self._db
                return
            # IMMEDIATE waits for the writer's lock now; a read that upgrades later may not wait.
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled back already.
                if self._db.in_transaction:
                    self._db.rollback()
                raise
            if self._log_has_deleted:
                self._log_has_deleted = not empty_log(self._db)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection for one statement, whose rows are fetched inside; for this room alone."""
        with self._lock, translated(self._path):
            yield self._db

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """The connection for several statements that see one state; for this room alone."""
        with self._lock, translated(self._path):
            inside = self._db.in_transaction  # of this thread, which has the lock
            if inside:
                yield self._db
                return
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._db.rollback()

    def _rows(self, sql: str, values: tuple[object, ...]) -> list[Any]:
        with self._lock, translated(self._path):
            return self._db.execute(sql, values).fetchall()

    def _rows_of_ids(self, sql: str, ids: Sequence[int], *values: object) -> Iterator[Any]:
        """Rows of `sql`, whose `{ids}` stands for the ids of one batch."""
        for first in range(0, len(ids), BATCH_ROWS):
            batch = [int(chunk_id) for chunk_id in ids[first : first + BATCH_ROWS]]
            marks = ",".join("?" * len(batch))
            yield from self._rows(sql.format(ids=marks), (*values, *batch))

    def _pages(
        self,
        sql: str,
        values: tuple[object, ...],
        *,
        after: int = 0,
        batch_rows: int = BATCH_ROWS,
    ) -> Iterator[Any]:
        """Rows of `sql`, whose last two values are "id greater than" and "at most"."""
        while rows := self._rows(sql, (*values, after, batch_rows)):
            after = rows[-1][0]
            yield from rows


def check_name(what: str, value: str) -> None:
    """Raise ValueError unless `value` is a text of a bearable length."""
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME:
        raise ValueError(f"{what} must have 1 to {_LONGEST_NAME} characters, got {value!r:.80}")
