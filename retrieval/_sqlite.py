"""Opening the catalog's database: pragmas, schema, and SQLite's errors as sentences."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ._lexical_table import SCHEMA as _LEXICAL_TABLES
from ._vector_changes import SCHEMA as _VECTOR_CHANGES
from .errors import CatalogError

_APPLICATION_ID = 0x6B767267  # "kvrg"

# AUTOINCREMENT: an id is never given twice, so that an index or a handle that still holds the id of
# a deleted chunk finds nothing, never another chunk.
# block_refs names its key's columns first: SQLite 3.40's integrity_check reports NULLs otherwise.
_FIRST_SCHEMA = """
CREATE TABLE namespaces (
    namespace TEXT PRIMARY KEY, generation INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE settings (
    namespace TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (namespace, key)
) WITHOUT ROWID;
CREATE TABLE documents (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL, id TEXT NOT NULL, title TEXT NOT NULL, source TEXT NOT NULL,
    metadata TEXT, added_at REAL NOT NULL,
    UNIQUE (namespace, id)
);
CREATE INDEX documents_in_order ON documents (namespace, sequence);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL, document_id TEXT NOT NULL, ordinal INTEGER NOT NULL,
    title TEXT NOT NULL, text TEXT NOT NULL,
    UNIQUE (namespace, document_id, ordinal),
    FOREIGN KEY (namespace, document_id) REFERENCES documents (namespace, id) ON DELETE CASCADE
);
CREATE INDEX chunks_in_order ON chunks (namespace, id);
CREATE TABLE chunk_tokens (
    chunk_id INTEGER NOT NULL REFERENCES chunks (id) ON DELETE CASCADE,
    namespace TEXT NOT NULL, tokenizer TEXT NOT NULL, token_ids BLOB NOT NULL,
    PRIMARY KEY (chunk_id, tokenizer)
);
CREATE TABLE vectors (
    namespace TEXT NOT NULL, embedder TEXT NOT NULL,
    chunk_id INTEGER NOT NULL REFERENCES chunks (id) ON DELETE CASCADE,
    vector BLOB NOT NULL,
    PRIMARY KEY (namespace, embedder, chunk_id)
);
CREATE INDEX vectors_of_chunk ON vectors (chunk_id);
CREATE TABLE block_refs (
    chunk_id INTEGER NOT NULL REFERENCES chunks (id) ON DELETE CASCADE,
    scope TEXT NOT NULL, block_key TEXT NOT NULL, namespace TEXT NOT NULL,
    PRIMARY KEY (chunk_id, scope, block_key)
) WITHOUT ROWID;
CREATE INDEX block_refs_of_key ON block_refs (block_key);
INSERT INTO settings VALUES ('', 'catalog_id', lower(hex(randomblob(16))));
"""

# Here AUTOINCREMENT lets whoever has seen the references up to an id find all later ones above it.
_NUMBERED_REFERENCES = """
ALTER TABLE block_refs RENAME TO old_block_refs;
DROP INDEX block_refs_of_key;
CREATE TABLE block_refs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    chunk_id INTEGER NOT NULL REFERENCES chunks (id) ON DELETE CASCADE,
    scope TEXT NOT NULL, block_key TEXT NOT NULL, namespace TEXT NOT NULL,
    UNIQUE (chunk_id, scope, block_key)
);
CREATE INDEX block_refs_of_key ON block_refs (block_key);
INSERT INTO block_refs (chunk_id, scope, block_key, namespace)
    SELECT chunk_id, scope, block_key, namespace FROM old_block_refs;
DROP TABLE old_block_refs;
"""

_OWED_DELETIONS = """
CREATE TABLE owed_deletions (block_key TEXT PRIMARY KEY) WITHOUT ROWID;
"""

# Of documents that their users named, who may ask for them back; chunks lose whitespace.
_DOCUMENT_TEXTS = """
CREATE TABLE document_texts (
    namespace TEXT NOT NULL, id TEXT NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (namespace, id),
    FOREIGN KEY (namespace, id) REFERENCES documents (namespace, id) ON DELETE CASCADE
) WITHOUT ROWID;
"""

# Which file each document came from, under a name that stays; '' for one that came from none. A
# document that several files hold stays as long as one of them does.
_ORIGINS = """
CREATE TABLE origins (
    namespace TEXT NOT NULL, origin TEXT NOT NULL, document_id TEXT NOT NULL,
    PRIMARY KEY (namespace, origin, document_id),
    FOREIGN KEY (namespace, document_id) REFERENCES documents (namespace, id) ON DELETE CASCADE
) WITHOUT ROWID;
CREATE INDEX origins_of_document ON origins (namespace, document_id);
"""

#: What leads from each version to the next, beginning with an empty file.
_STEPS = (
    _FIRST_SCHEMA,
    _NUMBERED_REFERENCES,
    _OWED_DELETIONS,
    _LEXICAL_TABLES,
    _DOCUMENT_TEXTS,
    _ORIGINS,
    _VECTOR_CHANGES,
)
SCHEMA_VERSION = len(_STEPS)

_LOG_WAIT_MS = 50

_SENTENCES = {
    sqlite3.SQLITE_BUSY: "is in use by another process; try again when it has finished",
    sqlite3.SQLITE_LOCKED: "is in use by another process; try again when it has finished",
    sqlite3.SQLITE_CORRUPT: "is damaged; restore it, or delete it and add the documents again",
    sqlite3.SQLITE_NOTADB: "is not an SQLite database, or is damaged at its beginning",
    sqlite3.SQLITE_READONLY: "cannot be written: the file or its folder is read-only",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: check that the folder exists and is writable",
    sqlite3.SQLITE_PERM: "cannot be opened: permission denied",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full",
    sqlite3.SQLITE_IOERR: "cannot be read or written: the disk reports an error",
    sqlite3.SQLITE_TOOBIG: "cannot hold a value of this size",
}


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's exceptions inside the block into CatalogError, with the catalog named."""
    try:
        yield
    except sqlite3.Error as exc:
        code = getattr(exc, "sqlite_errorcode", None)
        # The low byte is the primary code; the rest says which way it failed.
        sentence = _SENTENCES.get(code & 0xFF) if code is not None else None
        raise CatalogError(f"the catalog {path} {sentence or 'failed'} ({exc})") from exc


def connect(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """Open or create the database at `path`, in autocommit mode. Raises CatalogError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CatalogError(f"the catalog {path} has no folder: {exc.strerror}") from exc
    with translated(path):
        db = sqlite3.connect(
            path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
        )
        try:
            db.execute("PRAGMA foreign_keys = ON")
            _use_wal(db, busy_timeout_s)
            # A commit that was reported survives a power failure; an add costs far more than this.
            db.execute("PRAGMA synchronous = FULL")
            # Deleted text is overwritten, not only forgotten.
            db.execute("PRAGMA secure_delete = ON")
            _ensure_schema(db, path)
        except BaseException:
            db.close()
            raise
    return db


def empty_log(db: sqlite3.Connection) -> bool:
    """Move the write-ahead log into the database and empty its file: it holds what was deleted.

    False if another process is in the way, for which nobody waits longer than `_LOG_WAIT_MS`, or
    the disk fails.
    """
    (patience_ms,) = db.execute("PRAGMA busy_timeout").fetchone()
    db.execute(f"PRAGMA busy_timeout = {_LOG_WAIT_MS}")
    try:
        busy, _, _ = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error:
        return False
    finally:
        db.execute(f"PRAGMA busy_timeout = {patience_ms}")
    return not busy


def write_backup(db: sqlite3.Connection, path: Path, *statements: str) -> None:
    """Write the database of this instant to a new file, and run `statements` there. Durable."""
    with closing(sqlite3.connect(path, isolation_level=None)) as copy:
        db.backup(copy)
        # One file, with no log beside it that would have to be moved along.
        copy.execute("PRAGMA journal_mode = DELETE")
        copy.execute("PRAGMA synchronous = FULL")
        for statement in statements:
            copy.execute(statement)


def _use_wal(db: sqlite3.Connection, busy_timeout_s: float) -> None:
    # Two processes that create the file at once: SQLite answers BUSY here without waiting.
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _ensure_schema(db: sqlite3.Connection, path: Path) -> None:
    if _version(db, path) == SCHEMA_VERSION:
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have changed it while this one waited for the lock.
        for step in _STEPS[_version(db, path) :]:
            for statement in step.split(";"):
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.rollback()
        raise


def _version(db: sqlite3.Connection, path: Path) -> int:
    """0 for an empty database; raises CatalogError for a newer or a foreign one."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    owner = int(db.execute("PRAGMA application_id").fetchone()[0])
    if owner == _APPLICATION_ID and 1 <= version <= SCHEMA_VERSION:
        return version
    if owner == _APPLICATION_ID:
        raise CatalogError(
            f"the catalog {path} has schema version {version}; this release reads up to "
            f"version {SCHEMA_VERSION}: upgrade kvrag"
        )
    has_tables = db.execute("SELECT EXISTS (SELECT 1 FROM sqlite_master)").fetchone()[0]
    if has_tables or owner or version:
        raise CatalogError(f"{path} is an SQLite database of another program, not a catalog")
    return 0
