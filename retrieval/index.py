"""The vector index: a FAISS cache of the vectors that the catalog holds for one embedder.

It can always be made again, so nothing wrong with its file is an error: a file that is absent,
damaged, of another catalog or of a lost future is rebuilt, and that is logged. A file that is
merely behind is caught up with: the catalog tells what has changed since.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from .catalog import Catalog
from .errors import needs_extra
from .vectors.base import IndexKind, Matrix, Structure
from .vectors.file import IndexFile, IndexIdentity
from .vectors.flat import Flat
from .vectors.kinds import IndexRule, build
from .vectors.rows import ChunkRows, Ids
from .vectors.sharing import SharedLock

__all__ = ["IndexRule", "VectorIndex"]

_log = logging.getLogger(__name__)
_BUILD_ROWS = 4096
_LAST = sys.maxsize  # behind every chunk


class VectorIndex:
    """Search by inner product (cosine, for unit vectors) over one namespace and embedder.

    Exact while it is `flat`; otherwise nearly: docs/retrieval.md has the figures. Scores are exact.

    Thread-safe: searches run side by side, and wait for `refresh()` while it takes changes over.
    Searches of an `ivfpq` index read the catalog, which holds the exact vectors.
    """

    def __init__(
        self,
        path: Path,
        catalog: Catalog,
        namespace: str,
        embedder: str,
        dim: int,
        rule: IndexRule,
    ) -> None:
        """Use `VectorIndex.open`."""
        with needs_extra("faiss", "the vector index"):
            import faiss
        self._faiss = faiss
        self._catalog = catalog
        self._namespace = namespace
        self._embedder = embedder
        self._dim = dim
        self._rule = rule
        identity = IndexIdentity(catalog.identity, namespace, embedder, dim)
        self._file = IndexFile(faiss, path, identity, _log)
        self._lock = SharedLock()
        self._saving = threading.RLock()  # one thread at a time makes or writes an index
        self._generation = 0
        self._saved: int | None = None  # the generation in the file
        self._unsaved = 0  # vectors that came or went since
        self._structure: Structure = Flat.empty(faiss, dim)
        self._rows = ChunkRows.of(np.empty(0, dtype=np.int64))

    @classmethod
    def open(
        cls,
        path: Path | str,
        catalog: Catalog,
        namespace: str,
        embedder_fingerprint: str,
        dim: int,
        rule: IndexRule | None = None,
    ) -> Self:
        """Load the file at `path` if it is of this catalog's past, and catch up; else rebuild.

        It is made anew, too, where `rule` asks for another kind or too much of it was deleted.
        What is new is in memory only, until `save()`; `is_saved` tells. Raises CatalogError if
        the catalog cannot be read, MissingExtraError without FAISS, ValueError if the stored
        vectors have another dim.
        """
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        index = cls(Path(path), catalog, namespace, embedder_fingerprint, dim, rule or IndexRule())
        saved = index._file.read()
        if saved is not None and not catalog.remembers(namespace, saved.generation):
            _log.info("the index %s is of another state of the catalog; rebuilding it", path)
            saved = None
        if saved is not None:
            index._structure, index._rows = saved.structure, saved.rows
            index._generation = index._saved = saved.generation
            index.refresh()
        if saved is None or index._is_due():
            index._rebuild()
        return index

    @property
    def is_saved(self) -> bool:
        """Whether the file was, when it was last read or written, what the index is."""
        return self._saved == self._generation

    @property
    def kind(self) -> IndexKind:
        """How the vectors are held now."""
        return self._structure.kind

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self._dim

    def __len__(self) -> int:
        return self._rows.num_live

    def search(
        self,
        vector: npt.NDArray[np.float32],
        k: int,
        *,
        allowed: npt.NDArray[np.int64] | None = None,
    ) -> list[tuple[int, float]]:
        """The `k` chunks nearest to `vector` `(dim,)`, as (chunk id, score), best first.

        All of them if there are fewer than `k`. `allowed`: `(n,)` int64, the only chunk ids to be
        looked at; ids that are not in the index do no harm. Equal scores come in order of chunk id,
        and while the index is flat the result does not depend on the order in which vectors were
        added.
        """
        query = np.ascontiguousarray(vector, dtype=np.float32)
        if query.shape != (self._dim,):
            raise ValueError(f"the vector must have the shape ({self._dim},), got {query.shape}")
        if not np.isfinite(query).all():
            raise ValueError("the vector must be finite")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        with self._lock.shared():
            rows = self._rows
            among = None if allowed is None else rows.find(np.asarray(allowed, dtype=np.int64))
            if not rows.num_live or (among is not None and not among.size):
                return []
            found = self._structure.nearest(query[None, :], k, rows.live, among)
            ids = rows.ids(found)
            matrix = self._structure.vectors(found)
        if matrix is None:
            ids, matrix = self._stored(ids)
        # Scored anew: FAISS sums by blocks of rows, so equal vectors may differ in the last bit.
        scores = (matrix.astype(np.float64) * query).sum(axis=1)
        order = np.lexsort((ids, -scores))[:k]
        return [(int(ids[place]), float(scores[place])) for place in order]

    def refresh(self) -> bool:
        """Take over what this or another process changed in the catalog; True if anything was.

        The index is then one state of the catalog. Costs one row read when nothing changed, else
        as much as changed.
        """
        if self._catalog.generation(self._namespace) == self._generation:
            return False
        with self._lock.alone():
            if self._catalog.remembers(self._namespace, self._generation):
                return self._caught_up()
        _log.info("more has changed than the catalog remembers; rebuilding the index")
        with self._saving:
            self._rebuild()
        return True

    def save(self, *, now: bool = False) -> bool:
        """Write the index if enough has changed, or anything with `now`; False if that failed.

        Without `now` it is also made anew where that is due, while searches go on. A failure is
        logged, and costs a rebuild or catching up at the next open and nothing else.
        """
        with self._saving:
            self.refresh()
            if not now and self._is_due():
                self._rebuild()
            may_wait = self._saved is not None and not now
            if self.is_saved or (may_wait and not self._is_behind()):
                return True
            with self._lock.shared():  # searches go on, and changes wait
                # Perhaps another process has written it. A file that was no good is replaced.
                others = self._file.generation() if self._saved is not None else None
                written = others == self._generation or self._file.write(
                    self._structure, self._rows, self._generation
                )
                self._saved = self._generation if written else None
                self._unsaved = 0
                return written

    def _is_due(self) -> bool:
        """Whether the index should be made anew."""
        rows = self._rows
        return (
            self._rule.kind(rows.num_live, self._structure.kind) != self._structure.kind
            or rows.num_dead > self._rule.dead_share * len(rows)
            or self._structure.is_outgrown()
        )

    def _is_behind(self) -> bool:
        """Whether so much has changed that the file should be written."""
        return self._rule.is_due(self._unsaved, len(self))

    def _caught_up(self) -> bool:
        """Whether there was anything to take over. With the lock alone."""
        changed = 0
        cursor = (self._generation, _LAST)
        while True:
            changes = self._catalog.vector_changes(self._namespace, self._embedder, cursor)
            for first, last in changes.ranges:
                rows = self._rows.between(first, last)
                gone = rows[~np.isin(self._rows.ids(rows), changes.ids)]
                if gone.size:
                    self._structure.forget(gone, self._rows.kill(gone))
                    changed += gone.size
            fresh, first_at = np.unique(changes.ids, return_index=True)
            vectors = changes.vectors[first_at]
            self._forget_replaced(fresh, vectors)
            new = ~np.isin(fresh, self._rows.ids(self._rows.find(fresh)))
            if new.any():
                self._append(fresh[new], vectors[new])
                changed += int(new.sum())
            cursor = changes.cursor
            if changes.is_last:
                self._generation = changes.generation
                self._unsaved += changed
                return changed > 0

    def _forget_replaced(self, ids: Ids, vectors: Matrix) -> None:
        """Chunks, ascending, whose vectors are others than those here: damaged ones were mended.

        Where these are not held, what is compared in the end is right all the same.
        """
        rows = self._rows.find(ids)
        held = self._structure.vectors(rows)
        if held is None or not rows.size:
            return
        places = np.searchsorted(ids, self._rows.ids(rows))
        other = rows[(held != self._checked(vectors)[places]).any(axis=1)]
        if other.size:
            self._structure.forget(other, self._rows.kill(other))

    def _append(self, ids: Ids, matrix: Matrix) -> None:
        self._structure.append(self._checked(matrix))
        self._rows.append(ids)

    def _rebuild(self) -> None:
        """Make the index anew from the catalog; the old one answers meanwhile."""
        source = _CatalogVectors(self._catalog, self._namespace, self._embedder, self._checked)
        # Read before the vectors: what changes in between is caught up with.
        generation = self._catalog.generation(self._namespace)
        kind = self._rule.kind(source.count, self._structure.kind if self._rows.num_live else None)
        structure = build(self._faiss, kind, self._dim, source)
        with self._lock.alone():
            self._structure, self._rows = structure, ChunkRows.of(source.ids())
            self._generation, self._saved = generation, None
            self._caught_up()

    def _stored(self, ids: Ids) -> tuple[Ids, Matrix]:
        """Those of the chunks that still have a vector, and it."""
        vectors = self._catalog.vectors(ids.tolist(), self._embedder)
        kept = [place for place, row in enumerate(vectors) if row is not None]
        rows = [row for row in vectors if row is not None]
        return ids[kept], np.stack(rows) if rows else np.empty((0, self._dim), dtype=np.float32)

    def _checked(self, matrix: Matrix) -> Matrix:
        if matrix.shape[1] != self._dim:
            raise ValueError(
                f"the stored vectors have {matrix.shape[1]} components, the embedder {self._dim}"
            )
        return np.ascontiguousarray(matrix)


class _CatalogVectors:
    """A `Source` over the catalog. `ids()`: of the vectors that `batches` gave, in order."""

    def __init__(
        self,
        catalog: Catalog,
        namespace: str,
        embedder: str,
        checked: Callable[[Matrix], Matrix],
    ) -> None:
        self._catalog, self._namespace, self._embedder = catalog, namespace, embedder
        self._checked = checked
        self._wanted = catalog.vector_ids(namespace, embedder)
        self.count = len(self._wanted)
        self._given: list[Ids] = []

    def sample(self, count: int) -> Matrix:
        chosen = sorted(random.Random(0).sample(self._wanted.tolist(), min(count, self.count)))
        rows = self._catalog.vectors(chosen, self._embedder)
        return self._checked(np.stack([row for row in rows if row is not None]))

    def batches(self) -> Iterator[Matrix]:
        for ids, matrix in self._catalog.iter_vectors(
            self._namespace, self._embedder, batch_rows=_BUILD_ROWS
        ):
            vectors = self._checked(matrix)
            self._given.append(ids)
            yield vectors

    def ids(self) -> Ids:
        return np.concatenate(self._given) if self._given else np.empty(0, dtype=np.int64)
