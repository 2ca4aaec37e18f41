"""One corpus: catalog, indexes and embedder of a namespace, opened when first needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kvrag.errors import EmptyCorpusError
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
from kvrag.retrieval.errors import CatalogError
from kvrag.retrieval.hybrid import Found, HybridSearch
from kvrag.retrieval.index import VectorIndex
from kvrag.searching import Search

__all__ = ["Corpus"]

_log = logging.getLogger(__name__)

#: Chunks whose vectors are made together when a home is opened with another embedder.
_BATCH = 64


class Corpus:
    """Documents of one namespace as one tokenizer and one embedder see them. Thread-safe.

    Token ids belong to a tokenizer and vectors to an embedder; what a home lacks for the ones in
    use is made and stored on the way.
    """

    def __init__(
        self,
        catalog: Catalog,
        index_dir: Path,
        tokenizer: Tokenizer,
        *,
        namespace: str,
        embedder: str | Embedder,
        chunk_tokens: int,
        replace: Callable[[Callable[[], DeletedDocument | None]], bool],
    ) -> None:
        """embedder: one, or the name of one. replace: runs what replaces a document."""
        self._catalog, self._index_dir, self._tokenizer = catalog, index_dir, tokenizer
        self._namespace, self._embedder = namespace, embedder
        self._chunk_tokens, self._replace = chunk_tokens, replace
        self._lock = threading.RLock()
        self._opened: tuple[Embedder, VectorIndex] | None = None
        self._chunker: Chunker | None = None
        self._hybrid = HybridSearch(catalog, namespace, self._open)

    @property
    def catalog(self) -> Catalog:
        return self._catalog

    @property
    def namespace(self) -> str:
        return self._namespace

    def add(self, document: Document) -> bool:
        """Chunk, encode, embed and store a document; False if it is there already.

        Another content under its id is replaced. Its KV is not computed here.
        """
        stored = self._catalog.document(self._namespace, document.id)
        if stored is not None and self._has_content(stored, document):
            if (stored.source, stored.metadata) != (document.source, document.metadata) and (
                document.is_named
            ):
                self._catalog.describe_document(self._namespace, document)
            return False
        embedder, _ = self._open()
        with self._lock:
            if self._chunker is None:
                self._chunker = Chunker(
                    lambda text: len(self._tokenizer.encode(text)), self._chunk_tokens
                )
            chunker = self._chunker
        rendered = [(p, render_chunk(p.title, p.text)) for p in chunker.split(document)]
        chunks = [ChunkInput(p.title, p.text, self._tokenizer.encode(text)) for p, text in rendered]
        vectors = embedder.embed_documents([text for _, text in rendered])
        into = (self._namespace, document, chunks)
        tokenizer, fingerprint = self._tokenizer.digest, embedder.fingerprint
        if stored is None:
            return self._catalog.add_document(
                *into, tokenizer=tokenizer, vectors=vectors, embedder=fingerprint
            )
        self._replace(
            partial(
                self._catalog.replace_document,
                *into,
                tokenizer=tokenizer,
                vectors=vectors,
                embedder=fingerprint,
            )
        )
        return True

    def text(self, document_id: str) -> str | None:
        """See `Catalog.document_text`."""
        return self._catalog.document_text(self._namespace, document_id)

    def prepare(self) -> None:
        """Open embedder and indexes, which the first search does otherwise."""
        self._open()
        self._hybrid.prepare()

    def search(self, question: str, k: int, search: Search) -> list[ContextChunk]:
        """At most `k` chunks, best first; None of the fields of `search` is left open."""
        if not self._catalog.counts(self._namespace).chunks:
            raise EmptyCorpusError("the corpus is empty; add documents first, or give passages")
        if search.mode is None or search.mmr is None:
            raise ValueError(f"a search leaves nothing open, got {search!r}")
        hits = self._hybrid.search(
            question, k, mode=search.mode, where=search.filter(), mmr=search.mmr
        )
        chunks = self._catalog.chunk([hit.chunk_id for hit in hits], namespace=self._namespace)
        found = (self._context(chunk, hit) for chunk, hit in zip(chunks, hits, strict=True))
        return [context for context in found if context is not None]

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

    def save(self) -> None:
        """Write the vector index, if it was opened; it can always be rebuilt."""
        with self._lock:
            if self._opened is not None:
                self._opened[1].save()

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

    def _open(self) -> tuple[Embedder, VectorIndex]:
        with self._lock:
            if self._opened is None:
                embedder = self._embedder
                if isinstance(embedder, str):
                    embedder = open_embedder(embedder)
                self._fill_vectors(embedder)
                name = f"{embedder.fingerprint}.faiss"
                index = VectorIndex.open(
                    self._index_dir / self._catalog_name() / name,
                    self._catalog,
                    self._namespace,
                    embedder.fingerprint,
                    embedder.dim,
                )
                if len(index) and not index.is_saved:
                    # Else every process to come makes it anew, and what was deleted without an
                    # engine stays in the file.
                    index.save()
                self._opened = (embedder, index)
            return self._opened

    def _catalog_name(self) -> str:
        """A folder name for the namespace: its bytes in hex, so that none names a path."""
        return self._namespace.encode().hex()

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
