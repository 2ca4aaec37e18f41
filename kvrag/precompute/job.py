"""The offline corpus job: every chunk's KV computed once and stored, interrupted at any point.

What is done is what the store holds: after a kill the job looks at each chunk's key and computes
only the blocks that no durable tier has. Memory does not grow with the corpus, apart from the
vector index, an id a document, and a few hundred bytes a block in the store's ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvrag.blocks import ChunkBlocks
from kvrag.corpus import Corpus
from kvrag.errors import KvragError
from kvrag.references import References
from kvrag.retrieval.documents import Document
from kvrag.retrieval.loaders import Skipped
from kvrag.store.block import Block
from kvrag.store.keys import BlockKey

__all__ = ["PrecomputeJob", "Progress", "StorageFullError"]


class StorageFullError(KvragError):
    """A corpus block could not be stored durably; what was stored before stays."""


@dataclass(slots=True)
class Progress:
    """Where a job stands. Seconds are of computing and storing alone.

    total_chunks, of the documents that the job was given, is known when all of them are added.
    """

    documents_added: int = 0
    documents_known: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    total_chunks: int | None = None
    chunks_done: int = 0
    chunks_stored_before: int = 0
    tokens_computed: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    cancelled: bool = False

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_computed / self.seconds if self.seconds else 0.0

    @property
    def remaining_s(self) -> float | None:
        """Estimate from the chunks computed so far; None as long as there are none."""
        computed = self.chunks_done - self.chunks_stored_before
        if self.total_chunks is None or computed == 0:
            return None
        return (self.total_chunks - self.chunks_done) * self.seconds / computed


class PrecomputeJob:
    """Adds documents to a corpus and computes the blocks that are missing."""

    def __init__(
        self,
        corpus: Corpus,
        kinds: Callable[[Sequence[int]], Sequence[ChunkBlocks]],
        references: References,
        is_stored: Callable[[BlockKey], bool],
    ) -> None:
        """kinds: the blocks to make of a chunk. `is_stored` asks the durable tiers for a key."""
        self._corpus, self._kinds = corpus, kinds
        self._references, self._is_stored = references, is_stored

    def run(
        self,
        documents: Iterable[Document | Skipped] | None,
        report: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Progress:
        """Add `documents` and compute the blocks that they lack; None: those of the whole corpus.

        Args:
            report: called after every document and every chunk.
            cancelled: asked as often; true ends the job, and what was stored stays.

        Raises:
            StorageFullError: no durable tier takes a block.
        """
        progress = Progress()
        catalog, namespace = self._corpus.catalog, self._corpus.namespace
        if documents is None:
            progress.total_chunks = catalog.counts(namespace).chunks
            chunk_ids = catalog.chunk_ids(namespace)
        else:
            added = self._add(documents, progress, report, cancelled)
            known = (catalog.document(namespace, document_id) for document_id in added)
            progress.total_chunks = sum(document.num_chunks for document in known if document)
            chunk_ids = (c for d in added for c in catalog.document_chunks(namespace, d))
        for chunk_id in chunk_ids:
            if progress.cancelled or cancelled():
                progress.cancelled = True
                break
            token_ids = self._corpus.token_ids(chunk_id)
            if token_ids is not None:
                made = [
                    self._store(kind, chunk_id, token_ids, progress)
                    for kind in self._kinds(token_ids)
                ]
                progress.chunks_stored_before += not any(made)
            progress.chunks_done += 1
            report(progress)
        return progress

    def _add(
        self,
        documents: Iterable[Document | Skipped],
        progress: Progress,
        report: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> list[str]:
        """Ids of the documents, new ones and known, each once."""
        ids: dict[str, None] = {}
        for document in documents:
            if cancelled():
                progress.cancelled = True
                break
            if isinstance(document, Skipped):
                progress.skipped.append(document)
            else:
                if self._corpus.add(document):
                    progress.documents_added += 1
                else:
                    progress.documents_known += 1
                ids[document.id] = None
            report(progress)
        self._corpus.save()
        return list(ids)

    def _store(
        self, blocks: ChunkBlocks, chunk_id: int, token_ids: tuple[int, ...], progress: Progress
    ) -> bool:
        """False if the block was there already."""
        key = blocks.key(token_ids)
        # The reference comes first: a block without one may be evicted, a reference without its
        # block only means that the block is computed when it is wanted.
        if not self._references.add(key, chunk_id, blocks.scope):
            return True  # deleted meanwhile
        if self._is_stored(key):
            return False
        begun = time.perf_counter()

        def compute() -> Block:
            block = blocks.compute(token_ids)
            self._put(blocks, block, chunk_id, progress)
            progress.tokens_computed += len(token_ids)
            return block

        made = blocks.make(token_ids, compute)
        if made is not None and not made.computed and not self._is_stored(key):
            # Who computed it was a request, whose KV need not become durable.
            self._put(blocks, made.block, chunk_id, progress)
        progress.seconds += time.perf_counter() - begun
        return True

    def _put(self, blocks: ChunkBlocks, block: Block, chunk_id: int, progress: Progress) -> None:
        outcome = blocks.put(block, durable_only=True)
        if not outcome.durable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.refused)
            raise StorageFullError(f"the KV of chunk {chunk_id} could not be stored ({reasons})")
        progress.bytes_written += block.nbytes
