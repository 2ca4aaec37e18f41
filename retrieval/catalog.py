"""The catalog: documents, their chunks, token ids, vectors and references to stored KV blocks.

One SQLite file, the only truth of the room; the vector index is a cache of it. Every row carries
its namespace. Block keys, scopes and fingerprints are opaque text here. A write is one transaction:
after a crash at any instant it is there whole or not at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._block_refs import BlockRefs
from ._catalog_file import check_name
from ._corpora import Corpora
from ._lexical_table import begin_table, fill, forget, table_of
from ._origins import Origins
from ._sqlite import translated, write_backup
from ._vectors import checked_vectors
from .documents import Document
from .errors import CatalogError
from .records import (
    ChunkInput,
    Counts,
    DeletedDocument,
    DocumentCopy,
    StoredChunk,
    StoredDocument,
)
from .where import Where

__all__ = [
    "Catalog",
    "ChunkInput",
    "Counts",
    "DeletedDocument",
    "StoredChunk",
    "StoredDocument",
]

_TOKEN_DTYPE = np.dtype("<u4")


class Catalog(BlockRefs, Corpora, Origins):
    """Thread-safe: one connection behind one lock, held for one statement or transaction.

    Several processes may have the same file open; a writer waits `busy_timeout_s` for another.
    Iterators fetch in batches by key, hold nothing between batches, and see concurrent changes.
    Anything SQLite reports, and any use after `close()`, is a CatalogError.
    """

    @property
    def identity(self) -> str:
        """32 hex digits, drawn when the file was made: tells one catalog from its successor."""
        return self.setting("", "catalog_id") or ""

    # ---- documents ----------------------------------------------------------------------------

    def add_document(
        self,
        namespace: str,
        document: Document,
        chunks: Sequence[ChunkInput],
        *,
        tokenizer: str,
        vectors: npt.NDArray[np.float32],
        embedder: str,
    ) -> bool:
        """Store a document with its chunks; False, and nothing changes, if it is there already.

        vectors: (len(chunks), dim) float32, finite; dim the same for every use of `embedder` in
        the namespace. Raises ValueError for inputs that do not line up.
        """
        check_name("namespace", namespace)
        matrix = checked_vectors(vectors, len(chunks))
        text = document.text if document.is_named else None
        metadata = _metadata_text(document.metadata)
        row = (document.id, document.title, document.source, metadata, time.time())
        with self.writing():
            if not self._insert_document(namespace, row, text):
                return False
            self._check_dim(namespace, embedder, matrix.shape[1])
            chunk_ids = self._insert_chunks(
                namespace, document.id, chunks, tokenizer, matrix, embedder
            )
            self._bump_generation(namespace, chunk_ids)
        return True

    def restore(
        self,
        namespace: str,
        documents: Iterable[DocumentCopy],
        settings: Mapping[str, str],
        *,
        tokenizer: str,
        embedder: str,
    ) -> bool:
        """Make a namespace of what another catalog's held; False if this one has documents of it.

        In one transaction, which lasts as long as `documents` take to come; what they raise leaves
        nothing. `settings` are those of the namespace, and replace what it has of their names.
        Raises ValueError for inputs that do not line up.
        """
        check_name("namespace", namespace)
        with self.writing() as db:
            if self._rows("SELECT 1 FROM documents WHERE namespace = ? LIMIT 1", (namespace,)):
                return False
            for key, value in settings.items():
                self.set_setting(namespace, key, value)
            restored: list[int] = []
            for copy in documents:
                metadata = _metadata_text(copy.metadata)
                row = (copy.id, copy.title, copy.source, metadata, copy.added_at)
                matrix = checked_vectors(copy.vectors, len(copy.chunks))
                if not self._insert_document(namespace, row, copy.text):
                    raise ValueError(f"the document {copy.id!r:.80} comes twice")
                self._check_dim(namespace, embedder, matrix.shape[1])
                chunk_ids = self._insert_chunks(
                    namespace, copy.id, copy.chunks, tokenizer, matrix, embedder
                )
                db.executemany(
                    "INSERT INTO origins (namespace, origin, document_id) VALUES (?, ?, ?) "
                    "ON CONFLICT DO NOTHING",
                    [(namespace, origin, copy.id) for origin in copy.origins],
                )
                restored += chunk_ids
                for chunk_id, blocks in zip(chunk_ids, copy.blocks, strict=True):
                    for scope, key in blocks:
                        self.add_block_ref(key, chunk_id, scope)
            self._bump_generation(namespace, restored)
        return True

    def delete_document(self, namespace: str, document_id: str) -> DeletedDocument | None:
        """Delete a document, its chunks, their token ids, vectors and references; None if absent.

        The result names the block keys whose last reference went with it. Their deletion is owed
        from then on: whoever deletes those blocks does so after this returns, and then calls
        `settle_deletions`.

        No file holds the text any more when this returns; or, where another process is reading or
        writing at that instant, after one of the next writes, or when the last process closes.
        """
        doomed = (namespace, document_id)
        with self.writing() as db:
            chunk_ids = self.document_chunks(namespace, document_id)
            orphans = db.execute(
                "SELECT DISTINCT r.block_key FROM block_refs r JOIN chunks c ON c.id = r.chunk_id "
                "WHERE c.namespace = ? AND c.document_id = ? AND NOT EXISTS ("
                "  SELECT 1 FROM block_refs r2 JOIN chunks c2 ON c2.id = r2.chunk_id"
                "  WHERE r2.block_key = r.block_key"
                "  AND NOT (c2.namespace = ? AND c2.document_id = ?)"
                ") ORDER BY r.block_key",
                (*doomed, *doomed),
            ).fetchall()
            deleted = db.execute("DELETE FROM documents WHERE namespace = ? AND id = ?", doomed)
            if deleted.rowcount == 0:
                return None
            forget(db, namespace, chunk_ids)
            db.executemany("INSERT INTO owed_deletions VALUES (?) ON CONFLICT DO NOTHING", orphans)
            self._log_has_deleted = True
            self._bump_generation(namespace, chunk_ids)
        return DeletedDocument(tuple(chunk_ids), tuple(key for (key,) in orphans))

    def replace_document(
        self,
        namespace: str,
        document: Document,
        chunks: Sequence[ChunkInput],
        *,
        tokenizer: str,
        vectors: npt.NDArray[np.float32],
        embedder: str,
    ) -> DeletedDocument | None:
        """Store a document in the place of the one with its id, in one transaction.

        What went with the other one, as `delete_document` tells it; None if there was none.
        """
        with self.writing():
            deleted = self.delete_document(namespace, document.id)
            self.add_document(
                namespace,
                document,
                chunks,
                tokenizer=tokenizer,
                vectors=vectors,
                embedder=embedder,
            )
        return deleted

    def describe_document(self, namespace: str, document: Document) -> bool:
        """Give the stored document of this id another source and metadata; False if absent."""
        with self.writing() as db:
            changed = db.execute(
                "UPDATE documents SET source = ?, metadata = ? WHERE namespace = ? AND id = ?",
                (document.source, _metadata_text(document.metadata), namespace, document.id),
            )
            if changed.rowcount > 0:
                self._bump_generation(namespace, ())  # other chunks may pass a filter
            return changed.rowcount > 0

    def document_text(self, namespace: str, document_id: str) -> str | None:
        """The text as it was added; None for a document that is absent or named by its content."""
        rows = self._rows(
            "SELECT text FROM document_texts WHERE namespace = ? AND id = ?",
            (namespace, document_id),
        )
        return str(rows[0][0]) if rows else None

    def documents(self, namespace: str, limit: int = 100, offset: int = 0) -> list[StoredDocument]:
        """The namespace's documents in the order in which they were added."""
        if limit < 0 or offset < 0:
            raise ValueError(f"limit and offset must not be negative, got {limit} and {offset}")
        rows = self._rows(
            f"{_SELECT_DOCUMENT} WHERE d.namespace = ? ORDER BY d.sequence LIMIT ? OFFSET ?",
            (namespace, limit, offset),
        )
        return [_stored_document(row) for row in rows]

    def iter_documents(self, namespace: str) -> Iterator[StoredDocument]:
        """Yield all of them, in that order."""
        for row in self._pages(
            f"{_SELECT_DOCUMENT_AFTER} WHERE d.namespace = ? AND d.sequence > ? "
            "ORDER BY d.sequence LIMIT ?",
            (namespace,),
        ):
            yield _stored_document(row[1:])

    def document(self, namespace: str, document_id: str) -> StoredDocument | None:
        """One document, or None."""
        rows = self._rows(
            f"{_SELECT_DOCUMENT} WHERE d.namespace = ? AND d.id = ?", (namespace, document_id)
        )
        return _stored_document(rows[0]) if rows else None

    # ---- chunks -------------------------------------------------------------------------------

    def document_chunks(self, namespace: str, document_id: str) -> list[int]:
        """The ids of a document's chunks in their order; empty if the document is absent."""
        rows = self._rows(
            "SELECT id FROM chunks WHERE namespace = ? AND document_id = ? ORDER BY ordinal",
            (namespace, document_id),
        )
        return [chunk_id for (chunk_id,) in rows]

    def chunk_ids(self, namespace: str) -> Iterator[int]:
        """Yield the ids of all chunks of a namespace, ascending."""
        for (chunk_id,) in self._pages(
            "SELECT id FROM chunks WHERE namespace = ? AND id > ? ORDER BY id LIMIT ?",
            (namespace,),
        ):
            yield chunk_id

    def chunk_ids_where(self, namespace: str, where: Where) -> npt.NDArray[np.int64]:
        """The ids of chunks whose document's metadata pass the filter, ascending: `(n,)` int64."""
        condition, values = where.sql("d.metadata")
        rows = self._rows(
            "SELECT c.id FROM documents d JOIN chunks c "
            "ON c.namespace = d.namespace AND c.document_id = d.id "
            f"WHERE d.namespace = ? AND d.metadata IS NOT NULL AND {condition} ORDER BY c.id",
            (namespace, *values),
        )
        return np.array([chunk_id for (chunk_id,) in rows], dtype=np.int64)

    def chunk(
        self, ids: Sequence[int], *, namespace: str | None = None
    ) -> list[StoredChunk | None]:
        """The chunks of `ids`, in line with them; None for an absent one.

        With `namespace`, a chunk of another namespace is as good as absent.
        """
        found: dict[int, StoredChunk] = {}
        for row in self._rows_of_ids(
            "SELECT c.id, c.namespace, c.document_id, c.ordinal, c.title, c.text, d.source "
            "FROM chunks c JOIN documents d ON d.namespace = c.namespace AND d.id = c.document_id "
            "WHERE c.id IN ({ids})",
            ids,
        ):
            if namespace is None or row[1] == namespace:
                found[row[0]] = StoredChunk(*row)
        return [found.get(int(chunk_id)) for chunk_id in ids]

    def token_ids(self, chunk_ids: Sequence[int], tokenizer: str) -> list[list[int] | None]:
        """The rendered chunks' token ids under `tokenizer`, in line; None where not stored."""
        found = {
            row[0]: np.frombuffer(row[1], dtype=_TOKEN_DTYPE).tolist()
            for row in self._rows_of_ids(
                "SELECT chunk_id, token_ids FROM chunk_tokens "
                "WHERE tokenizer = ? AND chunk_id IN ({ids})",
                chunk_ids,
                tokenizer,
            )
        }
        return [found.get(int(chunk_id)) for chunk_id in chunk_ids]

    def set_token_ids(self, chunk_id: int, tokenizer: str, token_ids: Sequence[int]) -> bool:
        """Store or replace a chunk's ids for one tokenizer; False if the chunk is gone."""
        blob = _token_blob(token_ids)
        with self.writing() as db:
            # SELECT ... WHERE, so that a chunk deleted meanwhile inserts nothing.
            changed = db.execute(
                "INSERT OR REPLACE INTO chunk_tokens (chunk_id, namespace, tokenizer, token_ids) "
                "SELECT id, namespace, ?, ? FROM chunks WHERE id = ?",
                (tokenizer, blob, int(chunk_id)),
            )
            return changed.rowcount > 0

    # ---- settings and numbers -----------------------------------------------------------------

    def setting(self, namespace: str, key: str) -> str | None:
        """A setting's value, or None."""
        rows = self._rows(
            "SELECT value FROM settings WHERE namespace = ? AND key = ?", (namespace, key)
        )
        return str(rows[0][0]) if rows else None

    def set_setting(self, namespace: str, key: str, value: str, *, overwrite: bool = True) -> str:
        """Store a setting; returns the value now in force.

        With `overwrite=False` the first writer wins, also among processes: so is a corpus prefix
        fixed once.
        """
        check_name("namespace", namespace)
        check_name("setting key", key)
        clash = "DO UPDATE SET value = excluded.value" if overwrite else "DO NOTHING"
        with self.writing() as db:
            db.execute(
                "INSERT INTO settings (namespace, key, value) VALUES (?, ?, ?) "
                f"ON CONFLICT (namespace, key) {clash}",
                (namespace, key, value),
            )
            return self.setting(namespace, key) or ""

    def seen_namespaces(self) -> list[str]:
        """Those, and every namespace that a setting was ever stored for, sorted."""
        rows = self._rows(
            "SELECT namespace FROM namespaces UNION "
            "SELECT namespace FROM settings WHERE namespace != '' ORDER BY 1",
            (),
        )
        return [name for (name,) in rows]

    def counts(self, namespace: str | None = None) -> Counts:
        """Documents, chunks, vectors and distinct blocks of a namespace, or of all."""
        where = "" if namespace is None else "WHERE namespace = ?"
        values = () if namespace is None else (namespace,)
        numbers = [
            self._rows(f"SELECT {what} FROM {table} {where}", values)[0][0]
            for table, what in (
                ("documents", "count(*)"),
                ("chunks", "count(*)"),
                ("vectors", "count(*)"),
                ("block_refs", "count(DISTINCT block_key)"),
            )
        ]
        return Counts(*numbers)

    def data_version(self) -> int:
        """A number that changes when another connection has changed the file."""
        return int(self._rows("PRAGMA data_version", ())[0][0])

    # ---- copies -------------------------------------------------------------------------------

    def write_copy(self, path: Path | str) -> None:
        """Write the catalog of this instant to `path`, without what it says of blocks.

        The copy has the same identity and generations, so that a vector index fits both. `path`
        must not exist; what a failure leaves there is for the caller to remove. Raises
        CatalogError.
        """
        with self._lock, translated(self._path):
            write_backup(
                self._db, Path(path), "DELETE FROM block_refs", "DELETE FROM owed_deletions"
            )

    # ---- helpers ------------------------------------------------------------------------------

    def _insert_document(
        self, namespace: str, row: tuple[str, str, str, str | None, float], text: str | None
    ) -> bool:
        """row: id, title, source, metadata, added_at. False if it is there. In a transaction."""
        inserted = self._db.execute(
            "INSERT INTO documents (namespace, id, title, source, metadata, added_at) "
            "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (namespace, *row),
        )
        if inserted.rowcount and text is not None:
            self._db.execute(
                "INSERT INTO document_texts VALUES (?, ?, ?)", (namespace, row[0], text)
            )
        return inserted.rowcount > 0

    def _insert_chunks(
        self,
        namespace: str,
        document_id: str,
        chunks: Sequence[ChunkInput],
        tokenizer: str,
        matrix: npt.NDArray[np.float32],
        embedder: str,
    ) -> list[int]:
        """All of a document's, with what belongs to each; their ids. In a transaction."""
        if not chunks:
            raise ValueError("a document has at least one chunk")
        db, words, ids = self._db, self._lexical_table(namespace), []
        for ordinal, chunk in enumerate(chunks):
            blob = _token_blob(chunk.token_ids)
            chunk_id = db.execute(
                "INSERT INTO chunks (namespace, document_id, ordinal, title, text) "
                "VALUES (?, ?, ?, ?, ?) RETURNING id",
                (namespace, document_id, ordinal, chunk.title, chunk.text),
            ).fetchone()[0]
            db.execute(
                "INSERT INTO chunk_tokens (chunk_id, namespace, tokenizer, token_ids) "
                "VALUES (?, ?, ?, ?)",
                (chunk_id, namespace, tokenizer, blob),
            )
            db.execute(
                "INSERT INTO vectors (namespace, embedder, chunk_id, vector) VALUES (?, ?, ?, ?)",
                (namespace, embedder, chunk_id, matrix[ordinal].tobytes()),
            )
            if words is not None:
                fill(db, words, namespace, [(chunk_id, chunk.title, chunk.text)])
            ids.append(int(chunk_id))
        return ids

    def _lexical_table(self, namespace: str) -> str | None:
        """The full-text table that new chunks go into; None while older ones are to be caught up.

        In a transaction.
        """
        table = table_of(self._db, namespace)
        if table is None:
            rows = self._rows("SELECT 1 FROM chunks WHERE namespace = ? LIMIT 1", (namespace,))
            if not rows:
                table, _ = begin_table(self._db, namespace)
        return table


_DOCUMENT_COLUMNS = (
    "d.id, d.namespace, d.title, d.source, d.metadata, d.added_at, "
    "(SELECT count(*) FROM chunks c WHERE c.namespace = d.namespace AND c.document_id = d.id) "
    "FROM documents d"
)
_SELECT_DOCUMENT = f"SELECT {_DOCUMENT_COLUMNS}"
_SELECT_DOCUMENT_AFTER = f"SELECT d.sequence, {_DOCUMENT_COLUMNS}"


def _stored_document(row: Any) -> StoredDocument:
    try:
        metadata = None if row[4] is None else json.loads(row[4])
    except ValueError as exc:
        raise CatalogError(f"the metadata of document {row[0]} is damaged: {exc}") from exc
    return StoredDocument(row[0], row[1], row[2], row[3], metadata, row[5], row[6])


def _metadata_text(metadata: dict[str, Any] | None) -> str | None:
    return None if metadata is None else json.dumps(metadata, ensure_ascii=False)


def _token_blob(token_ids: Sequence[int]) -> bytes:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"token ids are a non-empty list, got shape {ids.shape}")
    if ids.min() < 0 or ids.max() > np.iinfo(_TOKEN_DTYPE).max:
        raise ValueError("token ids must fit 32 bits without sign")
    return ids.astype(_TOKEN_DTYPE).tobytes()
