"""The vector index: a FAISS cache of the vectors that the catalog holds for one embedder.

It can always be made again, so nothing wrong with its file is an error: a file that is absent,
damaged, of another catalog or behind is rebuilt, and that is logged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ._index_file import IndexIdentity, read_index, write_index
from .catalog import Catalog
from .errors import needs_extra

__all__ = ["VectorIndex"]

_log = logging.getLogger(__name__)
_FETCH_ROWS = 512
_TIE_SLACK = 16
_TIE = 1e-6  # scores of unit vectors nearer than this may differ by FAISS's summation order alone


class VectorIndex:
    """Exact search by inner product (cosine, for unit vectors) over one namespace and embedder.

    State per vector: 4 * dim bytes, 8 for the id, and about 44 for FAISS's id-to-row map;
    1,588 bytes at dim 384. The file holds 4 * dim + 8 a vector.

    Thread-safe. Opening and `refresh()` read the catalog; `add`, `remove` and `search` do not.
    """

    def __init__(
        self, path: Path, catalog: Catalog, namespace: str, embedder: str, dim: int
    ) -> None:
        """Use `VectorIndex.open`."""
        with needs_extra("faiss", "the vector index"):
            import faiss
        self._faiss = faiss
        self._path = path
        self._catalog = catalog
        self._namespace = namespace
        self._embedder = embedder
        self._dim = dim
        self._lock = threading.RLock()
        self._generation = 0
        self._saved: int | None = None  # the generation in the file
        self._index = self._empty()

    @classmethod
    def open(
        cls, path: Path | str, catalog: Catalog, namespace: str, embedder_fingerprint: str, dim: int
    ) -> Self:
        """Load the file at `path` if it is this catalog's and up to date, else rebuild.

        A rebuilt index is in memory only, until `save()`; `is_saved` tells. Raises CatalogError if
        the catalog cannot be read, MissingExtraError without FAISS, ValueError if the stored
        vectors have another dim.
        """
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        index = cls(Path(path), catalog, namespace, embedder_fingerprint, dim)
        generation = catalog.generation(namespace)
        loaded = read_index(index._faiss, index._path, index._identity(generation), _log)
        if loaded is None:
            index._rebuild()
        else:
            index._index = loaded
            index._generation = index._saved = generation
        return index

    @property
    def is_saved(self) -> bool:
        """Whether the file was, when it was last read or written, what the index is."""
        with self._lock:
            return self._saved == self._generation

    def __len__(self) -> int:
        with self._lock:
            return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Components of a vector."""
        return self._dim

    def add(self, ids: Sequence[int], vectors: npt.NDArray[np.float32]) -> None:
        """Add vectors `(len(ids), dim)` float32; an id that is there already keeps its vector."""
        id_array = np.asarray(ids, dtype=np.int64)
        matrix = np.ascontiguousarray(vectors, dtype=np.float32)
        if id_array.ndim != 1 or matrix.shape != (len(id_array), self._dim):
            raise ValueError(
                f"vectors must have the shape ({id_array.size}, {self._dim}), got {matrix.shape}"
            )
        if id_array.size and id_array.min() < 0:
            raise ValueError("chunk ids are not negative")
        if not np.isfinite(matrix).all():
            raise ValueError("vectors must be finite")
        _, first = np.unique(id_array, return_index=True)
        with self._lock:
            fresh = first[~np.isin(id_array[first], self._ids())]
            if fresh.size:
                self._index.add_with_ids(matrix[fresh], id_array[fresh])

    def remove(self, ids: Sequence[int]) -> int:
        """Remove ids, absent ones included; returns how many were there."""
        id_array = np.asarray(ids, dtype=np.int64)
        with self._lock:
            return int(self._index.remove_ids(id_array)) if id_array.size else 0

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
        and the result does not depend on the order in which vectors were added.
        """
        query = np.ascontiguousarray(vector, dtype=np.float32)
        if query.shape != (self._dim,):
            raise ValueError(f"the vector must have the shape ({self._dim},), got {query.shape}")
        if not np.isfinite(query).all():
            raise ValueError("the vector must be finite")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        with self._lock:
            ids, rows = self._candidates(query, k, allowed)
        # Scored anew: FAISS sums by blocks of rows, so equal vectors may differ in the last bit.
        scores = (rows.astype(np.float64) * query).sum(axis=1)
        order = np.lexsort((ids, -scores))[:k]
        return [(int(ids[place]), float(scores[place])) for place in order]

    def refresh(self) -> bool:
        """Take over what this or another process changed in the catalog; True if anything was.

        Costs one row read when nothing changed, else a scan of ids and the vectors that are new.
        """
        with self._lock:
            generation = self._catalog.generation(self._namespace)
            if generation == self._generation:
                return False
            # The generation is read before the ids: a change in between is found next time.
            wanted = self._catalog.vector_ids(self._namespace, self._embedder)
            present = self._ids()
            gone = np.setdiff1d(present, wanted)
            missing = np.setdiff1d(wanted, present)
            self.remove(gone.tolist())
            for first in range(0, len(missing), _FETCH_ROWS):
                batch = missing[first : first + _FETCH_ROWS].tolist()
                found = self._catalog.vectors(batch, self._embedder)
                kept = [(i, row) for i, row in zip(batch, found, strict=True) if row is not None]
                if kept:
                    self._append(
                        np.array([i for i, _ in kept], dtype=np.int64),
                        np.stack([row for _, row in kept]),
                    )
            self._generation = generation
            return bool(gone.size or missing.size)

    def save(self) -> bool:
        """Write the index beside its sidecar, each atomically; False, and a warning, if it fails.

        A failure costs a rebuild at the next open and nothing else.
        """
        with self._lock:
            self.refresh()
            identity = self._identity(self._generation)
            written = write_index(self._faiss, self._index, self._path, identity, _log)
            self._saved = self._generation if written else None
            return written

    def _candidates(
        self, query: npt.NDArray[np.float32], k: int, allowed: npt.NDArray[np.int64] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids and vectors that surely hold the best `k`, ties at the boundary included."""
        size = len(self)
        options: Any = None
        if allowed is not None:
            options = self._faiss.SearchParameters()
            selector = self._faiss.IDSelectorBatch(
                allowed
            )  # lives as long as `options` points to it
            options.sel = selector
            size = min(size, len(allowed))
        k = min(k, size)
        if not k:
            return np.empty(0, dtype=np.int64), np.empty((0, self._dim), dtype=np.float32)
        fetch = min(size, k + _TIE_SLACK)
        while True:
            scores, ids = self._index.search(query[None, :], fetch, params=options)
            if fetch == size or scores[0, k - 1] - scores[0, fetch - 1] > _TIE:
                break
            fetch = min(size, 2 * fetch)
        chosen = ids[0][ids[0] >= 0]
        return chosen, self._index.reconstruct_batch(chosen)

    def _rebuild(self) -> None:
        with self._lock:
            self._index = self._empty()
            generation = self._catalog.generation(self._namespace)
            for ids, matrix in self._catalog.iter_vectors(self._namespace, self._embedder):
                self._append(ids, matrix)
            self._generation = generation

    def _append(self, ids: npt.NDArray[np.int64], matrix: npt.NDArray[np.float32]) -> None:
        """Add vectors of the catalog whose ids are known to be new."""
        if matrix.shape[1] != self._dim:
            raise ValueError(
                f"the stored vectors have {matrix.shape[1]} components, the embedder {self._dim}"
            )
        self._index.add_with_ids(np.ascontiguousarray(matrix), ids)

    def _identity(self, generation: int) -> IndexIdentity:
        return IndexIdentity(
            catalog=self._catalog.identity,
            namespace=self._namespace,
            embedder=self._embedder,
            dim=self._dim,
            generation=generation,
        )

    def _empty(self) -> Any:
        return self._faiss.IndexIDMap2(self._faiss.IndexFlatIP(self._dim))

    def _ids(self) -> npt.NDArray[np.int64]:
        ids: npt.NDArray[np.int64] = self._faiss.vector_to_array(self._index.id_map)
        return ids
