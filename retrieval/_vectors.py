"""What a catalog holds of chunks' vectors, and the number that counts changes of them.

Vectors never change but by `drop_vectors`, and others in their place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ._catalog_file import BATCH_ROWS, CatalogFile
from ._vector_changes import LARGEST_STEP, VectorChanges, changed_ranges, is_known, record

__all__ = ["Vectors", "checked_vectors"]

_VECTOR_DTYPE = np.dtype("<f4")


class Vectors(CatalogFile):
    """One vector a chunk and embedder, and the generations of namespaces."""

    def set_vectors(
        self, chunk_ids: Sequence[int], vectors: npt.NDArray[np.float32], embedder: str
    ) -> int:
        """Give chunks vectors of a further embedder; returns how many were stored.

        A chunk that is gone, or has a vector of this embedder already, is left as it is.
        """
        matrix = checked_vectors(vectors, len(chunk_ids))
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

    def namespaces(self) -> list[str]:
        """Every namespace that documents were ever added to, sorted."""
        return [name for (name,) in self._rows("SELECT namespace FROM namespaces ORDER BY 1", ())]

    def generation(self, namespace: str) -> int:
        """A number that grows with every change to documents, chunks or vectors; 0 at first.

        The steps are random, so that a catalog restored from a backup and changed anew does not
        come by a number that an index file of the lost future carries.
        """
        rows = self._rows("SELECT generation FROM namespaces WHERE namespace = ?", (namespace,))
        return int(rows[0][0]) if rows else 0

    def generations(self) -> dict[str, int]:
        """`generation` of every namespace that documents were ever added to."""
        return {name: self.generation(name) for name in self.namespaces()}

    def _check_dim(self, namespace: str, embedder: str, dim: int) -> None:
        rows = self._rows(
            "SELECT length(vector) FROM vectors WHERE namespace = ? AND embedder = ? LIMIT 1",
            (namespace, embedder),
        )
        if rows and rows[0][0] != dim * _VECTOR_DTYPE.itemsize:
            stored = rows[0][0] // _VECTOR_DTYPE.itemsize
            raise ValueError(f"embedder {embedder!r} has {stored} components here, got {dim}")

    def drop_vectors(self, chunk_ids: Sequence[int], embedder: str) -> None:
        """Delete vectors that are not what they should be."""
        with self.writing() as db:
            dropped: dict[str, list[int]] = {}
            for chunk_id in chunk_ids:
                for (namespace,) in db.execute(
                    "DELETE FROM vectors WHERE chunk_id = ? AND embedder = ? RETURNING namespace",
                    (int(chunk_id), embedder),
                ).fetchall():
                    dropped.setdefault(namespace, []).append(int(chunk_id))
            for namespace, ids in dropped.items():
                self._bump_generation(namespace, ids)

    def _bump_generation(self, namespace: str, chunk_ids: Sequence[int]) -> None:
        """Count a change, which was one of these chunks' vectors. In its transaction."""
        step = random.randint(1, LARGEST_STEP)
        self._db.execute(
            "INSERT INTO namespaces (namespace, generation) VALUES (?, ?) "
            "ON CONFLICT (namespace) DO UPDATE SET generation = generation + excluded.generation",
            (namespace, step),
        )
        record(self._db, namespace, self.generation(namespace), chunk_ids)


def checked_vectors(vectors: npt.NDArray[np.float32], rows: int) -> npt.NDArray[np.float32]:
    matrix = np.ascontiguousarray(vectors, dtype=_VECTOR_DTYPE)
    if matrix.ndim != 2 or matrix.shape[0] != rows or not matrix.shape[1]:
        raise ValueError(f"vectors must have the shape ({rows}, dim), got {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("vectors must be finite")
    return matrix
