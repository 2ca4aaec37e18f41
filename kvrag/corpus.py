"""One corpus: catalog, indexes and embedder of a namespace, opened when first needed."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrag.errors import EmptyCorpusError, InputError
from kvrag.made_with import MadeWith
from kvrag.models.hub import found_folder
from kvrag.models.tokenizer import Tokenizer
from kvrag.prefill import ContextChunk
from kvrag.retrieval.catalog import (
    Catalog,
    ChunkInput,
    DeletedDocument,
    StoredChunk,
    StoredDocument,
)
from kvrag.retrieval.chunking import Chunker, render_chunk
from kvrag.retrieval.documents import Document
from kvrag.retrieval.embedder import Embedder, open_embedder
from kvrag.retrieval.errors import CatalogError, RetrievalError
from kvrag.retrieval.hybrid import DenseIndex, Found, HybridSearch
from kvrag.retrieval.index import IndexRule, VectorIndex
from kvrag.retrieval.reranker import CrossEncoderReranker, Reranker
from kvrag.searching import Search

__all__ = ["Added", "ChunkedDocument", "Corpus"]

_log = logging.getLogger(__name__)

#: Chunks whose vectors are made together when a home is opened with another embedder.
_BATCH = 64

#: Opens what takes the vector index's place.
OpenIndex = Callable[[Catalog, str, Embedder], DenseIndex]


_EMBEDDER, _CHUNK_TOKENS = "embedder", "chunk_tokens"


@dataclass(frozen=True, slots=True)
class ChunkedDocument:
    """A document and its chunks, encoded."""

    document: Document
    chunks: tuple[ChunkInput, ...]


class Added(Enum):
    """What became of a document that was to be added."""

    NEW = "new"
    REPLACED = "replaced"
    KNOWN = "known"


class Corpus:
    """Documents of one namespace as one tokenizer and one embedder see them. Thread-safe.

    Token ids belong to a tokenizer; what a home lacks for the one in use is made and stored on the
    way. The embedder is the maker's, and so is that of all who search, until a rebuild.
    """

    def __init__(
        self,
        catalog: Catalog,
        index_dir: Path,
        tokenizer: Tokenizer,
        *,
        namespace: str,
        embedder: str | Embedder,
        cross_encoder: str | None = None,
        chunk_tokens: int,
        index: IndexRule | OpenIndex,
        replace: Callable[[Callable[[], DeletedDocument | None]], bool],
    ) -> None:
        """index_dir: the namespace's. embedder: one, or its name. cross_encoder: folder or hub id.

        replace: runs what may replace a document.
        """
        self._catalog, self._index_dir, self._tokenizer = catalog, index_dir, tokenizer
        self._namespace, self._chosen_embedder = namespace, embedder
        self._chunk_tokens, self._index, self._replace = chunk_tokens, index, replace
        self._cross_encoder = cross_encoder
        self._reranker: Reranker | None = None
        self._made_with = MadeWith(catalog, namespace)
        self._lock = threading.RLock()
        self._opened: tuple[Embedder, DenseIndex] | None = None
        self._chunker: Chunker | None = None
        self._hybrid = HybridSearch(catalog, namespace, self._open)

    @property
    def catalog(self) -> Catalog:
        return self._catalog

    @property
    def namespace(self) -> str:
        return self._namespace

    def holds(self, document: Document) -> bool:
        """Whether a document is there with this title and text."""
        stored = self._catalog.document(self._namespace, document.id)
        return stored is not None and self._has_content(stored, document)

    def describe(self, document: Document) -> None:
        """Give a document that is there the source and metadata of this one, if it was named."""
        if not document.is_named:  # as another source of the same content, which does not count
            return
        stored = self._catalog.document(self._namespace, document.id)
        if stored is not None and (
            (stored.source, stored.metadata) != (document.source, document.metadata)
        ):
            self._catalog.describe_document(self._namespace, document)

    def chunked(self, document: Document) -> ChunkedDocument:
        """A document cut and encoded, for `add`. Raises DocumentError if it cannot be cut."""
        with self._lock:
            if self._chunker is None:
                self._chunker = Chunker(
                    lambda text: len(self._tokenizer.encode(text)), self._chunk_tokens
                )
            chunker = self._chunker
        rendered = [(p, render_chunk(p.title, p.text)) for p in chunker.split(document)]
        return ChunkedDocument(
            document,
            tuple(
                ChunkInput(p.title, p.text, self._tokenizer.encode(text)) for p, text in rendered
            ),
        )

    def text(self, document_id: str) -> str | None:
        """See `Catalog.document_text`."""
        return self._catalog.document_text(self._namespace, document_id)

    def add(self, items: Sequence[ChunkedDocument], *, rebuild: bool = False) -> Iterator[Added]:
        """Embed documents together, and store each when it is asked for what became of it.

        KV is not computed here. What is done to the corpus before a document is asked for is done
        before it: one that was there and is gone by then is added.

        rebuild: whether a document that is there with other chunks is replaced, too.
        """
        times = Counter(item.document.id for item in items)  # more than one: the last one stays
        lacking = [
            times[item.document.id] > 1 or not self._is_current(item, rebuild) for item in items
        ]
        vectors = self._vectors([item for item, lacks in zip(items, lacking, strict=True) if lacks])
        for item, lacks in zip(items, lacking, strict=True):
            own = next(vectors) if lacks else None
            if own is None and not self._is_current(item, rebuild):
                own = next(self._vectors([item]))
            yield Added.KNOWN if own is None else self._store(item, own, rebuild)

    def _vectors(self, items: Sequence[ChunkedDocument]) -> Iterator[npt.NDArray[np.float32]]:
        """Those of each document's chunks, all made before the first is given."""
        if not items:
            return
        texts = [render_chunk(chunk.title, chunk.text) for item in items for chunk in item.chunks]
        vectors = self._open()[0].embed_documents(texts)
        first = 0
        for item in items:
            last = first + len(item.chunks)
            yield vectors[first:last]
            first = last

    def _is_current(self, item: ChunkedDocument, rebuild: bool) -> bool:
        if not self.holds(item.document):
            return False
        if not rebuild:
            return True
        stored = self._catalog.document_chunks(self._namespace, item.document.id)
        texts = [(c.title, c.text) for c in self._catalog.chunk(stored) if c is not None]
        return texts == [(chunk.title, chunk.text) for chunk in item.chunks]

    def _store(
        self, item: ChunkedDocument, vectors: npt.NDArray[np.float32], rebuild: bool
    ) -> Added:
        stored_as: dict[str, Any] = {
            "tokenizer": self._tokenizer.digest,
            "vectors": vectors,
            "embedder": self._embedder().fingerprint,
        }
        into = (self._namespace, item.document, item.chunks)
        if self._catalog.add_document(*into, **stored_as):
            return Added.NEW
        if self._is_current(item, rebuild):  # another process was faster
            return Added.KNOWN
        self._replace(partial(self._catalog.replace_document, *into, **stored_as))
        return Added.REPLACED

    def agree(self, *, rebuild: bool) -> None:
        """Hold the settings against those that the corpus was made with, which the first fixes.

        rebuild: whether the corpus takes the embedder in force from now on.

        Raises:
            CorpusSettingsError: they differ, and the corpus is not to be rebuilt.
        """
        embedder, cut = self._embedder().fingerprint, str(self._chunk_tokens)
        if rebuild:
            self._made_with.change(_EMBEDDER, embedder)
        self._made_with.fix(_EMBEDDER, embedder)
        if not rebuild:
            self._made_with.fix(_CHUNK_TOKENS, cut)

    def rebuilt(self) -> None:
        """From now on the corpus counts as cut by the present settings."""
        self._made_with.change(_CHUNK_TOKENS, str(self._chunk_tokens))

    def prepare(self) -> None:
        """Open embedder, indexes and cross-encoder, which the first search does otherwise."""
        self._open()
        self._hybrid.prepare()
        if self._cross_encoder is not None:
            self._open_reranker()

    def search(self, question: str, k: int, search: Search) -> list[ContextChunk]:
        """At most `k` chunks, best first; None of the fields of `search` is left open."""
        if not self._catalog.counts(self._namespace).chunks:
            raise EmptyCorpusError("the corpus is empty; add documents first, or give passages")
        if search.mode is None or search.mmr is None or search.distinct is None:
            raise ValueError(f"a search leaves nothing open, got {search!r}")
        rerank = None
        if search.rerank == "cross_encoder":
            self._open_reranker()  # before anything is looked for
            rerank = self._rerank
        hits = self._hybrid.search(
            question,
            k,
            mode=search.mode,
            where=search.filter(),
            mmr=search.mmr,
            distinct=search.distinct,
            rerank=rerank,
        )
        chunks = self._catalog.chunk([hit.chunk_id for hit in hits], namespace=self._namespace)
        found = (self._context(chunk, hit) for chunk, hit in zip(chunks, hits, strict=True))
        return [context for context in found if context is not None]

    def _rerank(self, question: str, chunk_ids: Sequence[int]) -> list[float | None]:
        chunks = self._catalog.chunk(chunk_ids, namespace=self._namespace)
        texts = [render_chunk(chunk.title, chunk.text) for chunk in chunks if chunk is not None]
        scores = iter(self._open_reranker().scores(question, texts).tolist())
        return [None if chunk is None else next(scores) for chunk in chunks]

    def _open_reranker(self) -> Reranker:
        with self._lock:
            if self._reranker is None:
                if self._cross_encoder is None:
                    raise InputError(
                        "rerank is 'cross_encoder', and the setting cross_encoder names none; "
                        "allowed without one is none"
                    )
                self._reranker = CrossEncoderReranker(found_folder(self._cross_encoder))
            return self._reranker

    def token_ids(self, chunk_id: int) -> tuple[int, ...] | None:
        """A chunk's stored ids; encoded and stored once for a tokenizer that is new to the home."""
        (stored,) = self._catalog.token_ids([chunk_id], self._tokenizer.digest)
        if stored is not None:
            return tuple(stored)
        (chunk,) = self._catalog.chunk([chunk_id], namespace=self._namespace)
        if chunk is None:
            return None
        token_ids = self._tokenizer.encode(render_chunk(chunk.title, chunk.text))
        try:
            self._catalog.set_token_ids(chunk_id, self._tokenizer.digest, token_ids)
        except CatalogError as exc:
            _log.warning("token ids of chunk %d are not kept: %s", chunk_id, exc)
        return tuple(token_ids)

    def documents(self, limit: int, offset: int) -> list[StoredDocument]:
        return self._catalog.documents(self._namespace, limit, offset)

    @property
    def embedder(self) -> Embedder:
        """What the corpus is searched with. Raises CorpusSettingsError if another made it."""
        embedder = self._embedder()
        self._made_with.check(_EMBEDDER, embedder.fingerprint)
        return embedder

    @property
    def index_is_saved(self) -> bool:
        """Whether the index in its file is that of the catalog; opens it. See `VectorIndex`."""
        with self._lock:
            self._opened = None
            return self._opened_index(self.embedder).is_saved

    def forget_index(self) -> None:
        """Vectors were replaced: who searches next makes the index of all of them."""
        with self._lock:
            self._opened = None
            shutil.rmtree(self._index_dir, ignore_errors=True)  # a cache

    def save(self) -> None:
        """Bring the vector index up to date, if it was opened, and write it if much has changed."""
        with self._lock:
            if self._opened is not None:
                self._opened[1].save()

    def close(self) -> None:
        """Write what the vector index's file lacks; a catalog that fails costs that alone."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None and len(opened[1]):
            try:
                opened[1].save(now=True)
            except RetrievalError as exc:
                _log.warning("the vector index was not saved: %s", exc)

    def _has_content(self, stored: StoredDocument, document: Document) -> bool:
        """Whether title and text are the same. An id made of them says so, unless it was given."""
        text = self.text(stored.id)
        if text is None and not document.is_named:
            return True
        return (stored.title, text) == (document.title, document.text)

    def _context(self, chunk: StoredChunk | None, hit: Found) -> ContextChunk | None:
        """None for a chunk that was deleted between the index and here: it is not found."""
        token_ids = None if chunk is None else self.token_ids(chunk.id)
        if chunk is None or token_ids is None:
            return None
        return ContextChunk(
            id=str(chunk.id),
            document=chunk.document_id,
            title=chunk.title,
            text=chunk.text,
            token_ids=token_ids,
            score=hit.score,
            match=hit.match,
        )

    def _embedder(self) -> Embedder:
        with self._lock:
            if isinstance(self._chosen_embedder, str):
                self._chosen_embedder = open_embedder(self._chosen_embedder)
            return self._chosen_embedder

    def _open(self) -> tuple[Embedder, DenseIndex]:
        with self._lock:
            if self._opened is None:
                embedder = self.embedder
                self._fill_vectors(embedder)
                index = self._opened_index(embedder)
                if len(index) and not index.is_saved:
                    # Else every process to come makes it anew, and what was deleted without an
                    # engine stays in the file.
                    index.save()
                self._opened = (embedder, index)
            return self._opened

    def _opened_index(self, embedder: Embedder) -> DenseIndex:
        if not isinstance(self._index, IndexRule):
            return self._index(self._catalog, self._namespace, embedder)
        return VectorIndex.open(
            self._index_dir / f"{embedder.fingerprint}.faiss",
            self._catalog,
            self._namespace,
            embedder.fingerprint,
            embedder.dim,
            self._index,
        )

    def _fill_vectors(self, embedder: Embedder) -> None:
        """Vectors of this embedder for chunks that were added with another."""
        batch: list[int] = []
        for chunk_id in self._catalog.chunks_without_vector(self._namespace, embedder.fingerprint):
            batch.append(chunk_id)
            if len(batch) == _BATCH:
                self._embed(embedder, batch)
                batch = []
        self._embed(embedder, batch)

    def _embed(self, embedder: Embedder, chunk_ids: Sequence[int]) -> None:
        chunks = [chunk for chunk in self._catalog.chunk(chunk_ids) if chunk is not None]
        if chunks:
            texts = [render_chunk(chunk.title, chunk.text) for chunk in chunks]
            vectors = embedder.embed_documents(texts)
            self._catalog.set_vectors([chunk.id for chunk in chunks], vectors, embedder.fingerprint)
