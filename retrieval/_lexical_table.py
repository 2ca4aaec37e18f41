"""The full-text tables of the catalog's database: one a namespace, kept by its transactions.

A table of its own, since BM25 weighs by how rare a term is: of one table for all, scores would tell
a namespace of the others' documents.

`filled_to` is the id up to which a namespace's chunks are in its table; ids only grow. A catalog of
an older schema, and one whose terms are made differently now, is caught up with batch by batch.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

from .terms import TERMS_VERSION, terms

#: `terms` has decided what is a term; this only has to leave it whole. Marks are part of one.
_TOKENIZER = "porter unicode61 remove_diacritics 0 categories 'L* N* Co Mn Mc'"

SCHEMA = """
CREATE TABLE lexical_tables (
    number INTEGER PRIMARY KEY, namespace TEXT NOT NULL UNIQUE,
    version INTEGER NOT NULL, filled_to INTEGER NOT NULL
);
"""

Row = tuple[int, str, str]

#: Chunks of a table that is merged whenever something is deleted from it.
_MERGED_AT_ONCE = 20_000


def table_of(db: sqlite3.Connection, namespace: str) -> str | None:
    """The name of the namespace's table if it holds every chunk, else None."""
    row = db.execute(
        "SELECT number FROM lexical_tables t WHERE namespace = ? AND version = ? AND filled_to >= "
        "coalesce((SELECT max(id) FROM chunks c WHERE c.namespace = t.namespace), 0)",
        (namespace, TERMS_VERSION),
    ).fetchone()
    return None if row is None else f"lexical_{row[0]}"


def begin_table(db: sqlite3.Connection, namespace: str) -> tuple[str, int]:
    """The table, made if there is none of this version, and its `filled_to`. In a transaction."""
    row = db.execute(
        "SELECT number, version, filled_to FROM lexical_tables WHERE namespace = ?", (namespace,)
    ).fetchone()
    if row is not None and row[1] == TERMS_VERSION:
        return f"lexical_{row[0]}", row[2]
    drop_table(db, namespace)
    number = db.execute(
        "INSERT INTO lexical_tables (namespace, version, filled_to) VALUES (?, ?, 0)",
        (namespace, TERMS_VERSION),
    ).lastrowid
    db.execute(
        f'CREATE VIRTUAL TABLE lexical_{number} USING fts5(title, text, tokenize = "{_TOKENIZER}")'
    )
    return f"lexical_{number}", 0


def drop_table(db: sqlite3.Connection, namespace: str) -> None:
    """Delete the table, if there is one. In a transaction."""
    row = db.execute(
        "SELECT number FROM lexical_tables WHERE namespace = ?", (namespace,)
    ).fetchone()
    if row is not None:
        db.execute(f"DROP TABLE lexical_{row[0]}")
        db.execute("DELETE FROM lexical_tables WHERE number = ?", (row[0],))


def fill(db: sqlite3.Connection, table: str, namespace: str, rows: Iterable[Row]) -> None:
    """Put (id, title, text) of chunks into the table, ids ascending. In a transaction."""
    last = 0
    for chunk_id, title, text in rows:
        db.execute(
            f"INSERT INTO {table} (rowid, title, text) VALUES (?, ?, ?)",
            (chunk_id, " ".join(terms(title)), " ".join(terms(text))),
        )
        last = chunk_id
    db.execute(
        "UPDATE lexical_tables SET filled_to = max(filled_to, ?) WHERE namespace = ?",
        (last, namespace),
    )


def forget(db: sqlite3.Connection, namespace: str, chunk_ids: Sequence[int]) -> None:
    """Take chunks out of the namespace's table, if it has one. In a transaction.

    FTS5 only marks what is deleted: its words go from the file when it merges what it holds. Small
    tables are merged at once, some 10 us a chunk; large ones in FTS5's own time.
    """
    row = db.execute(
        "SELECT number FROM lexical_tables WHERE namespace = ?", (namespace,)
    ).fetchone()
    if row is None:
        return
    table = f"lexical_{row[0]}"
    db.executemany(f"DELETE FROM {table} WHERE rowid = ?", [(i,) for i in chunk_ids])
    held = f"SELECT count(*) FROM (SELECT 1 FROM {table}_docsize LIMIT ?)"
    if db.execute(held, (_MERGED_AT_ONCE + 1,)).fetchone()[0] <= _MERGED_AT_ONCE:
        db.execute(f"INSERT INTO {table} ({table}) VALUES ('optimize')")
