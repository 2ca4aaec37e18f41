"""The offline corpus job: every chunk's KV computed once and stored, interrupted at any point.

Loading, cutting, embedding, computing and storing overlap, each a bounded number of items ahead of
the next. What is done is what the store holds: after a kill the job looks at each chunk's key and
computes only the blocks that no durable tier has. Memory does not grow with the corpus, apart from
the vector index, an id a document, and a few hundred bytes a block in the store's ledger.

Chunks are computed one at a time: joining the rows of several gains nothing on a CPU, where 64
rows keep the products as busy as a thousand do. By the processor's time the model alone is 0.76 to
1.04 times as fast with 3 to 10 chunks of 24 to 256 tokens joined (`kvrag bench precompute`).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kvrag.blocks import ChunkBlocks
from kvrag.corpus import Corpus
from kvrag.errors import KvragError
from kvrag.precompute.ahead import Stages
from kvrag.precompute.filing import Filed, Filing, Item
from kvrag.precompute.progress import Progress
from kvrag.precompute.shard import Shard
from kvrag.references import References
from kvrag.store.block import Block
from kvrag.store.keys import BlockKey

__all__ = ["PrecomputeJob", "Progress", "StorageFullError"]

#: Documents that a stage may be ahead of the next; each may have `max_document_bytes`.
_DOCUMENTS_AHEAD = 4
#: Chunks in hand: one is computed while the blocks of the other are stored.
_CHUNKS_IN_HAND = 2


class StorageFullError(KvragError):
    """A corpus block could not be stored durably; what was stored before stays."""


class PrecomputeJob:
    """Adds documents to a corpus and computes the blocks that are missing. For one run."""

    def __init__(
        self,
        corpus: Corpus,
        kinds: Callable[[Sequence[int]], Sequence[ChunkBlocks]],
        references: References,
        is_stored: Callable[[BlockKey], bool],
        *,
        shard: Shard | None = None,
        rebuild: bool = False,
    ) -> None:
        """kinds: the blocks to make of a chunk. `is_stored` asks the durable tiers for a key."""
        self._corpus, self._kinds = corpus, kinds
        self._references, self._is_stored = references, is_stored
        self._shard, self._rebuild = shard or Shard(), rebuild
        self._progress = Progress()
        #: Held while the model computes, and while the numbers are changed.
        self._computing, self._counting = threading.Lock(), threading.Lock()
        self._begun: float | None = None

    def run(
        self,
        documents: Iterable[Item] | None,
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
        progress = self._progress
        with Stages() as stages:
            chunk_ids = self._all() if documents is None else self._added(documents, stages)
            self._compute(chunk_ids, report, cancelled)
        return progress

    def _all(self) -> Iterator[int | None]:
        catalog, namespace = self._corpus.catalog, self._corpus.namespace
        self._progress.total_chunks = catalog.counts(namespace).chunks
        yield from catalog.chunk_ids(namespace)

    def _added(self, documents: Iterable[Item], stages: Stages) -> Iterator[int | None]:
        """Ids of the chunks of the documents; None where there is something to report."""
        filing = Filing(
            self._corpus, self._references, self._progress, shard=self._shard, rebuild=self._rebuild
        )
        total = 0

        def saved(items: Iterator[Filed | None]) -> Iterator[Filed | None]:
            try:
                yield from items
            finally:
                self._corpus.save()

        loaded = stages.ahead(documents, room=_DOCUMENTS_AHEAD)
        chunked = stages.ahead(filing.chunked(loaded), room=_DOCUMENTS_AHEAD)
        for filed in stages.ahead(saved(filing.filed(chunked)), room=_DOCUMENTS_AHEAD):
            yield None
            if filed is not None:
                total += len(filed.chunk_ids)
                yield from filed.chunk_ids
        self._progress.total_chunks = total
        yield None

    def _compute(
        self,
        chunk_ids: Iterator[int | None],
        report: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        in_hand: deque[Future[None]] = deque()
        with ThreadPoolExecutor(_CHUNKS_IN_HAND, "kvrag-chunk") as pool:
            try:
                for chunk_id in chunk_ids:
                    if cancelled():
                        self._progress.cancelled = True
                        break
                    if chunk_id is not None:
                        in_hand.append(pool.submit(self._chunk, chunk_id))
                    if len(in_hand) == _CHUNKS_IN_HAND:
                        in_hand.popleft().result()
                    report(self._progress)
                while in_hand:
                    in_hand.popleft().result()
                    report(self._progress)
            finally:
                for future in in_hand:
                    future.cancel()

    def _chunk(self, chunk_id: int) -> None:
        token_ids = self._corpus.token_ids(chunk_id)
        made = False
        if token_ids is not None:
            for kind in self._kinds(token_ids):
                made |= self._store(kind, chunk_id, token_ids)
        with self._counting:
            self._progress.chunks_stored_before += token_ids is not None and not made
            self._progress.chunks_done += 1

    def _store(self, blocks: ChunkBlocks, chunk_id: int, token_ids: tuple[int, ...]) -> bool:
        """False if the block was there already."""
        key = blocks.key(token_ids)
        # The reference comes first: a block without one may be evicted, a reference without its
        # block only means that the block is computed when it is wanted.
        if not self._references.add(key, chunk_id, blocks.scope):
            return True  # deleted meanwhile
        if self._is_stored(key):
            return False

        def compute() -> Block:
            block = self._computed(blocks, token_ids)
            self._put(blocks, block, chunk_id)
            with self._counting:
                self._progress.tokens_computed += len(token_ids)
            return block

        made = blocks.make(token_ids, compute)
        if made is not None and not made.computed and not self._is_stored(key):
            # Who computed it was a request, whose KV need not become durable.
            self._put(blocks, made.block, chunk_id)
        return True

    def _computed(self, blocks: ChunkBlocks, token_ids: tuple[int, ...]) -> Block:
        with self._computing:
            begun = time.perf_counter()
            self._begun = begun if self._begun is None else self._begun
            block = blocks.compute(token_ids)
            self._progress.compute_s += time.perf_counter() - begun
            return block

    def _put(self, blocks: ChunkBlocks, block: Block, chunk_id: int) -> None:
        outcome = blocks.put(block, durable_only=True)
        if not outcome.durable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.refused)
            raise StorageFullError(f"the KV of chunk {chunk_id} could not be stored ({reasons})")
        with self._counting:
            self._progress.bytes_written += block.nbytes
            if self._begun is not None:
                self._progress.seconds = time.perf_counter() - self._begun
