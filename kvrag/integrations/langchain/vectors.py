"""A LangChain vector store (Qdrant, pgvector, Milvus, …) in the place of the vector index.

    store = QdrantVectorStore(client, "corpus", embedding=KVRagEmbeddings(open_embedder("minilm")))
    engine = Engine.open(settings, vectors=store)

The catalog stays the truth of documents, texts, vectors and KV. The store is asked which chunks are
near a question; those that the catalog does not have, or not any more, are dropped and counted, and
scores are made from the catalog's vectors. What changed in the catalog is written to the store
before it is next asked, once, by whichever process comes first: how far that went is a setting in
the catalog.
"""

from __future__ import annotations

import logging
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from kvrag.errors import InputError
from kvrag.integrations.langchain.embedder import LangChainEmbedder
from kvrag.retrieval.catalog import Catalog
from kvrag.retrieval.chunking import render_chunk
from kvrag.retrieval.embedder import Embedder
from kvrag.retrieval.errors import RetrievalError, VectorStoreError

__all__ = ["KVRagEmbeddings", "StoredVectors", "embedder_of"]

_log = logging.getLogger(__name__)

_CHUNK, _CORPUS = "kvrag_chunk", "kvrag_corpus"
_BATCH = 64
_SLACK = 16
#: So many chunks that a filter allows are compared by the catalog's vectors, one by one.
_EXACT_CHUNKS = 5_000
_PROBED = 16
_LAST = sys.maxsize  # behind every chunk

Ids = npt.NDArray[np.int64]


class KVRagEmbeddings(Embeddings):
    """An embedder of kvrag's for a vector store, which is given vectors that the catalog has."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self._of_thread = threading.local()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        known: dict[str, list[float]] = getattr(self._of_thread, "known", {})
        new = [text for text in dict.fromkeys(texts) if text not in known]
        made = dict(zip(new, self.embedder.embed_documents(new).tolist(), strict=True))
        return [known[text] if text in known else made[text] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector: list[float] = self.embedder.embed_query(text).tolist()
        return vector

    @contextmanager
    def knowing(self, vectors: dict[str, list[float]]) -> Iterator[None]:
        """Texts that this thread need not have embedded, and their vectors."""
        self._of_thread.known = vectors
        try:
            yield
        finally:
            del self._of_thread.known


def embedder_of(store: VectorStore) -> Embedder:
    """What embeds a store's texts, as the embedder of a corpus; InputError if nothing does."""
    embeddings = store.embeddings
    if embeddings is None:
        raise InputError(
            f"the vector store {type(store).__name__} names no embeddings; give it some, for "
            "instance kvrag.integrations.langchain.KVRagEmbeddings(embedder)"
        )
    if isinstance(embeddings, KVRagEmbeddings):
        return embeddings.embedder
    return LangChainEmbedder(embeddings)


class StoredVectors:
    """The vector index of one namespace in a vector store. Thread-safe if the store is.

    Ids in the store are UUIDs made of catalog, namespace and chunk id, so that corpora may share a
    collection; but what a store finds for others is dropped here, so one each is better.

    num_dropped: answers of the store that named no chunk of this corpus
    """

    def __init__(
        self, store: VectorStore, catalog: Catalog, namespace: str, embedder: Embedder
    ) -> None:
        """Raises VectorStoreError if the store fails, CatalogError if the catalog does."""
        self._store, self._catalog, self._namespace = store, catalog, namespace
        self._embedder = embedder
        self._corpus = f"{catalog.identity}/{namespace}"
        kind = f"{type(store).__module__}.{type(store).__qualname__}"
        collection = getattr(store, "collection_name", "")
        self._setting = f"vectors {kind} {collection} {embedder.fingerprint}"[:500]
        self._lock = threading.Lock()
        self._generation: int | None = None
        self.num_dropped = 0
        self.refresh()
        if not self._is_whole():
            _log.warning("the vector store lacks chunks of the corpus; writing all of them")
            self._catalog.set_setting(namespace, self._setting, "")
            self._generation = None
            self.refresh()

    def __len__(self) -> int:
        return self._catalog.counts(self._namespace).vectors

    @property
    def is_saved(self) -> bool:
        """Whether the store has what it had to have when it was last looked at."""
        return self._generation is not None

    def save(self, *, now: bool = False) -> bool:
        """Write what has changed; a store keeps it by itself."""
        self.refresh()
        return True

    def refresh(self) -> bool:
        """Write what changed in the catalog to the store; True if anything was.

        Cut short, it is done again from where it began: writing twice changes nothing.
        """
        if self._catalog.generation(self._namespace) == self._generation:
            return False
        with self._lock:
            begun = self._written()
            if begun is not None and not self._catalog.remembers(self._namespace, begun):
                begun = None
            changed = False
            if begun is None:
                begun = self._catalog.generation(self._namespace)
                for ids, vectors in self._catalog.iter_vectors(
                    self._namespace, self._embedder.fingerprint, batch_rows=_BATCH
                ):
                    self._put(ids, vectors)
                    changed = True
            cursor = (begun, _LAST)
            while True:
                changes = self._catalog.vector_changes(
                    self._namespace, self._embedder.fingerprint, cursor
                )
                there = set(changes.ids.tolist())
                touched = (i for first, last in changes.ranges for i in range(first, last + 1))
                self._delete([chunk_id for chunk_id in touched if chunk_id not in there])
                for first in range(0, len(changes.ids), _BATCH):
                    batch = slice(first, first + _BATCH)
                    self._put(changes.ids[batch], changes.vectors[batch])
                changed |= bool(changes.ranges)
                cursor = changes.cursor
                if changes.is_last:
                    break
            if self._written() != changes.generation:
                number = str(changes.generation)
                self._catalog.set_setting(self._namespace, self._setting, number)
            self._generation = changes.generation
            return changed

    def search(
        self,
        vector: npt.NDArray[np.float32],
        k: int,
        *,
        allowed: npt.NDArray[np.int64] | None = None,
    ) -> list[tuple[int, float]]:
        """As `VectorIndex.search`, as nearly as the store finds. Raises VectorStoreError."""
        if allowed is not None and len(allowed) <= _EXACT_CHUNKS:
            return self._scored(vector, np.asarray(allowed, dtype=np.int64))[0][:k]
        fetch = k + _SLACK
        while True:
            found = self._nearest(vector, fetch)
            known = [chunk_id for chunk_id in found if chunk_id is not None]
            ids = np.array(list(dict.fromkeys(known)), dtype=np.int64)
            kept = ids if allowed is None else ids[np.isin(ids, allowed)]
            scored, num_absent = self._scored(vector, kept)
            # A store that finds fewer than it was asked for has no more.
            if len(scored) >= k or len(found) < fetch:
                self.num_dropped += len(found) - len(known) + num_absent
                return scored[:k]
            fetch *= 4

    def _nearest(self, vector: npt.NDArray[np.float32], count: int) -> list[int | None]:
        """Ids of the nearest chunks; None for what is of no chunk of this corpus."""
        with self._translated("searched by a vector"):
            found = self._store.similarity_search_by_vector(vector.tolist(), k=count)
        return [self._chunk_id(document) for document in found]

    def _chunk_id(self, document: Document) -> int | None:
        chunk_id = document.metadata.get(_CHUNK)
        is_own = document.metadata.get(_CORPUS) == self._corpus
        return chunk_id if is_own and isinstance(chunk_id, int) else None

    def _scored(
        self, vector: npt.NDArray[np.float32], ids: Ids
    ) -> tuple[list[tuple[int, float]], int]:
        """Chunks with their cosine, best first, and how many the catalog does not have."""
        rows = self._catalog.vectors(ids.tolist(), self._embedder.fingerprint)
        scored = [
            (int(chunk_id), float(row.astype(np.float64) @ vector))
            for chunk_id, row in zip(ids, rows, strict=True)
            if row is not None
        ]
        return sorted(scored, key=lambda item: (-item[1], item[0])), len(ids) - len(scored)

    def _put(self, ids: Ids, vectors: npt.NDArray[np.float32]) -> None:
        chunks = self._catalog.chunk(ids.tolist(), namespace=self._namespace)
        kept = [
            (chunk, render_chunk(chunk.title, chunk.text), vector)
            for chunk, vector in zip(chunks, vectors.tolist(), strict=True)
            if chunk is not None
        ]
        if not kept:
            return
        texts = [text for _, text, _ in kept]
        embeddings = self._store.embeddings
        with self._translated("written"):
            if isinstance(embeddings, KVRagEmbeddings):
                with embeddings.knowing({text: vector for _, text, vector in kept}):
                    self._add([chunk.id for chunk, _, _ in kept], texts)
            else:
                self._add([chunk.id for chunk, _, _ in kept], texts)

    def _add(self, ids: Sequence[int], texts: list[str]) -> None:
        metadatas = [{_CHUNK: chunk_id, _CORPUS: self._corpus} for chunk_id in ids]
        self._store.add_texts(texts, metadatas, ids=self._names(ids))

    def _delete(self, ids: Sequence[int]) -> None:
        for first in range(0, len(ids), _BATCH):
            with self._translated("written"):
                self._store.delete(self._names(ids[first : first + _BATCH]))

    def _names(self, ids: Sequence[int]) -> list[str]:
        return [str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self._corpus}/{i}")) for i in ids]

    def _written(self) -> int | None:
        """The state of the catalog up to which the store was written."""
        text = self._catalog.setting(self._namespace, self._setting)
        return int(text) if text else None

    def _is_whole(self) -> bool:
        """Whether some chunks that must be in the store are: it may be a new or another one."""
        ids = self._catalog.vector_ids(self._namespace, self._embedder.fingerprint)
        asked = ids[:: max(1, len(ids) // _PROBED)]
        try:
            found = self._store.get_by_ids(self._names(asked.tolist()))
        except NotImplementedError:  # a store that cannot be asked is taken at its word
            return True
        except Exception as exc:  # stores raise what their clients raise
            raise VectorStoreError(f"{type(self._store).__name__} cannot be read: {exc}") from exc
        return {self._chunk_id(document) for document in found} >= set(asked.tolist())

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """Turn whatever a store's client raises into VectorStoreError."""
        try:
            yield
        except RetrievalError:
            raise
        except Exception as exc:
            raise VectorStoreError(
                f"the vector store {type(self._store).__name__} cannot be {what}: {exc!r:.500}"
            ) from exc
