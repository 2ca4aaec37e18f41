"""The catalog: documents, their chunks, token ids, vectors and references to stored KV blocks.

One SQLite file, the only truth of the room; the vector index is a cache of it. Every row carries
its namespace. Block keys, scopes and fingerprints are opaque text here. A write is one transaction:
after a crash at any instant it is there whole or not at all.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._block_refs import BlockRefs
from ._catalog_file import BATCH_ROWS, check_name
from ._lexical_table import begin_table, fill, forget, table_of
from ._origins import Origins
from ._sqlite import translated, write_backup
from ._vector_changes import LARGEST_STEP, VectorChanges, changed_ranges, is_known, record
from .documents import Document
from .errors import CatalogError
from .records import ChunkInput, Counts, DeletedDocument, StoredChunk, StoredDocument
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
_VECTOR_DTYPE = np.dtype("<f4")


class Catalog(BlockRefs, Origins):
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
        matrix = _checked_vectors(vectors, len(chunks))
        if not chunks:
            raise ValueError("a document has at least one chunk")
        token_blobs = [_token_blob(chunk.token_ids) for chunk in chunks]
        metadata = _metadata_text(document)
        with self.writing() as db:
            inserted = db.execute(
                "INSERT INTO documents (namespace, id, title, source, metadata, added_at) "
                "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (namespace, document.id, document.title, document.source, metadata, time.time()),
            )
            if inserted.rowcount == 0:
                return False
            if document.is_named:
                db.execute(
                    "INSERT INTO document_texts VALUES (?, ?, ?)",
                    (namespace, document.id, document.text),
                )
            self._check_dim(namespace, embedder, matrix.shape[1])
            words = self._lexical_table(namespace)
            chunk_ids: list[int] = []
            for ordinal, chunk in enumerate(chunks):
                chunk_id = db.execute(
                    "INSERT INTO chunks (namespace, document_id, ordinal, title, text) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (namespace, document.id, ordinal, chunk.title, chunk.text),
                ).lastrowid
                db.execute(
                    "INSERT INTO chunk_tokens (chunk_id, namespace, tokenizer, token_ids) "
                    "VALUES (?, ?, ?, ?)",
                    (chunk_id, namespace, tokenizer, token_blobs[ordinal]),
                )
                db.execute(
                    "INSERT INTO vectors (namespace, embedder, chunk_id, vector) "
                    "VALUES (?, ?, ?, ?)",
                    (namespace, embedder, chunk_id, matrix[ordinal].tobytes()),
                )
                chunk_ids.append(int(chunk_id or 0))
                if words is not None:
                    fill(db, words, namespace, [(chunk_ids[-1], chunk.title, chunk.text)])
            self._bump_generation(namespace, chunk_ids)
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
                (document.source, _metadata_text(document), namespace, document.id),
            )
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

    # ---- vectors ------------------------------------------------------------------------------

    def set_vectors(
        self, chunk_ids: Sequence[int], vectors: npt.NDArray[np.float32], embedder: str
    ) -> int:
        """Give chunks vectors of a further embedder; returns how many were stored.

        A chunk that is gone, or has a vector of this embedder already, is left as it is: vectors
        never change, so an index knows them by chunk id alone.
        """
        matrix = _checked_vectors(vectors, len(chunk_ids))
        num_stored = 0
        with self.writing() as db:
            changed: dict[str, list[int]] = {}
            for chunk_id, vector in zip(chunk_ids, matrix, strict=True):
                row = db.execute(
                    "SELECT namespace FROM chunks WHERE id = ?", (int(chunk_id),)
                ).fetchone()
                if row is None:
                    continue
                if row[0] not in changed:
                    self._check_dim(row[0], embedder, matrix.shape[1])
                stored = db.execute(
                    "INSERT INTO vectors (namespace, embedder, chunk_id, vector) "
                    "VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                    (row[0], embedder, int(chunk_id), vector.tobytes()),
                ).rowcount
                changed.setdefault(row[0], []).extend([int(chunk_id)] * stored)
                num_stored += stored
            for namespace, ids in changed.items():
                self._bump_generation(namespace, ids)
        return num_stored

    def vectors(
        self, chunk_ids: Sequence[int], embedder: str
    ) -> list[npt.NDArray[np.float32] | None]:
        """The chunks' vectors `(dim,)` float32, read-only, in line; None where not stored."""
        found = {
            row[0]: np.frombuffer(row[1], dtype=_VECTOR_DTYPE)
            for row in self._rows_of_ids(
                "SELECT chunk_id, vector FROM vectors WHERE embedder = ? AND chunk_id IN ({ids})",
                chunk_ids,
                embedder,
            )
        }
        return [found.get(int(chunk_id)) for chunk_id in chunk_ids]

    def vector_ids(self, namespace: str, embedder: str) -> npt.NDArray[np.int64]:
        """The ids of all chunks with a vector, ascending: `(n,)` int64. Reads no vector."""
        ids = [
            chunk_id
            for (chunk_id,) in self._pages(
                "SELECT chunk_id FROM vectors "
                "WHERE namespace = ? AND embedder = ? AND chunk_id > ? ORDER BY chunk_id LIMIT ?",
                (namespace, embedder),
                batch_rows=16 * BATCH_ROWS,
            )
        ]
        return np.array(ids, dtype=np.int64)

    def iter_vectors(
        self, namespace: str, embedder: str, *, batch_rows: int = BATCH_ROWS
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """Yield `(ids (n,) int64 ascending, matrix (n, dim) float32)`, n at most `batch_rows`."""
        after = 0
        while rows := self._rows(
            "SELECT chunk_id, vector FROM vectors "
            "WHERE namespace = ? AND embedder = ? AND chunk_id > ? ORDER BY chunk_id LIMIT ?",
            (namespace, embedder, after, batch_rows),
        ):
            after = rows[-1][0]
            matrix = np.frombuffer(b"".join(row[1] for row in rows), dtype=_VECTOR_DTYPE)
            yield np.array([row[0] for row in rows], dtype=np.int64), matrix.reshape(len(rows), -1)

    def vector_changes(
        self, namespace: str, embedder: str, after: tuple[int, int], *, limit: int = 32
    ) -> VectorChanges:
        """What came and went behind `after`: the vectors of one state of the catalog.

        after: `cursor` of the changes before these, or (a generation that `remembers` knows, or
            the one that was read before the vectors were, and the largest integer).
        limit: of ranges of chunks, each of at most 1,024.
        """
        with self.snapshot() as db:
            rows = changed_ranges(db, namespace, after, limit)
            ids, blobs = [], []
            for _, first, last in rows:
                for chunk_id, blob in db.execute(
                    "SELECT chunk_id, vector FROM vectors "
                    "WHERE namespace = ? AND embedder = ? AND chunk_id BETWEEN ? AND ?",
                    (namespace, embedder, first, last),
                ):
                    ids.append(chunk_id)
                    blobs.append(blob)
            generation = self.generation(namespace)
        matrix = np.frombuffer(b"".join(blobs), dtype=_VECTOR_DTYPE)
        return VectorChanges(
            generation=generation,
            ranges=[(first, last) for _, first, last in rows],
            ids=np.array(ids, dtype=np.int64),
            vectors=matrix.reshape(len(ids), -1) if ids else matrix.reshape(0, 0),
            cursor=rows[-1][:2] if rows else after,
            is_last=len(rows) < limit,
        )

    def remembers(self, namespace: str, generation: int) -> bool:
        """Whether `vector_changes` can tell all that has changed since that generation."""
        with self.reading() as db:
            return is_known(db, namespace, generation)

    def chunks_without_vector(self, namespace: str, embedder: str) -> Iterator[int]:
        """Yield the ids of chunks that have no vector of `embedder`, ascending."""
        for (chunk_id,) in self._pages(
            "SELECT id FROM chunks c WHERE namespace = ? AND NOT EXISTS ("
            "  SELECT 1 FROM vectors v"
            "  WHERE v.namespace = c.namespace AND v.embedder = ? AND v.chunk_id = c.id"
            ") AND id > ? ORDER BY id LIMIT ?",
            (namespace, embedder),
        ):
            yield chunk_id

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

    def namespaces(self) -> list[str]:
        """Every namespace that documents were ever added to, sorted."""
        return [name for (name,) in self._rows("SELECT namespace FROM namespaces ORDER BY 1", ())]

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

    def generation(self, namespace: str) -> int:
        """A number that grows with every change to the namespace's chunks or vectors; 0 at first.

        The steps are random, so that a catalog restored from a backup and changed anew does not
        come by a number that an index file of the lost future carries.
        """
        rows = self._rows("SELECT generation FROM namespaces WHERE namespace = ?", (namespace,))
        return int(rows[0][0]) if rows else 0

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

    def generations(self) -> dict[str, int]:
        """`generation` of every namespace that documents were ever added to."""
        return {name: self.generation(name) for name in self.namespaces()}

    # ---- helpers ------------------------------------------------------------------------------

    def _bump_generation(self, namespace: str, chunk_ids: Sequence[int]) -> None:
        """Count a change, which was one of these chunks' vectors. In its transaction."""
        step = random.randint(1, LARGEST_STEP)
        self._db.execute(
            "INSERT INTO namespaces (namespace, generation) VALUES (?, ?) "
            "ON CONFLICT (namespace) DO UPDATE SET generation = generation + excluded.generation",
            (namespace, step),
        )
        record(self._db, namespace, self.generation(namespace), chunk_ids)

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

    def _check_dim(self, namespace: str, embedder: str, dim: int) -> None:
        rows = self._rows(
            "SELECT length(vector) FROM vectors WHERE namespace = ? AND embedder = ? LIMIT 1",
            (namespace, embedder),
        )
        if rows and rows[0][0] != dim * _VECTOR_DTYPE.itemsize:
            stored = rows[0][0] // _VECTOR_DTYPE.itemsize
            raise ValueError(f"embedder {embedder!r} has {stored} components here, got {dim}")


_SELECT_DOCUMENT = (
    "SELECT d.id, d.namespace, d.title, d.source, d.metadata, d.added_at, "
    "(SELECT count(*) FROM chunks c WHERE c.namespace = d.namespace AND c.document_id = d.id) "
    "FROM documents d"
)


def _stored_document(row: Any) -> StoredDocument:
    try:
        metadata = None if row[4] is None else json.loads(row[4])
    except ValueError as exc:
        raise CatalogError(f"the metadata of document {row[0]} is damaged: {exc}") from exc
    return StoredDocument(row[0], row[1], row[2], row[3], metadata, row[5], row[6])


def _metadata_text(document: Document) -> str | None:
    if document.metadata is None:
        return None
    return json.dumps(document.metadata, ensure_ascii=False)


def _token_blob(token_ids: Sequence[int]) -> bytes:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"token ids are a non-empty list, got shape {ids.shape}")
    if ids.min() < 0 or ids.max() > np.iinfo(_TOKEN_DTYPE).max:
        raise ValueError("token ids must fit 32 bits without sign")
    return ids.astype(_TOKEN_DTYPE).tobytes()


def _checked_vectors(vectors: npt.NDArray[np.float32], rows: int) -> npt.NDArray[np.float32]:
    matrix = np.ascontiguousarray(vectors, dtype=_VECTOR_DTYPE)
    if matrix.ndim != 2 or matrix.shape[0] != rows or not matrix.shape[1]:
        raise ValueError(f"vectors must have the shape ({rows}, dim), got {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("vectors must be finite")
    return matrix
