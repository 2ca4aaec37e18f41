"""The offline corpus job: every chunk's KV computed once and stored, interrupted at any point.

Loading, cutting, embedding, computing and storing overlap, each a bounded number of items ahead of
the next. What is done is what the store holds: after a kill the job looks at each chunk's key and
computes only the blocks that no durable tier has. Memory does not grow with the corpus, apart from
the vector index, an id a document, and a few hundred bytes a block in the store's ledger. Where
workers elsewhere compute, they begin when all documents are stored (`elsewhere`).

Chunks are computed one at a time: joining the rows of several gains nothing on a CPU, where 64
rows keep the products as busy as a thousand do. By the processor's time the model alone is 0.76 to
1.04 times as fast with 3 to 10 chunks of 24 to 256 tokens joined (`kvrag bench precompute`).
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

from kvrag.blocks import ChunkBlocks
from kvrag.corpus import Corpus
from kvrag.precompute.ahead import Stages
from kvrag.precompute.elsewhere import Elsewhere, Handed
from kvrag.precompute.filing import Filed, Filing, Item
from kvrag.precompute.making import Effort, Maker, StorageFullError, Wanted
from kvrag.precompute.progress import Progress
from kvrag.precompute.shard import Shard
from kvrag.references import References
from kvrag.store.keys import BlockKey

__all__ = ["PrecomputeJob", "Progress", "StorageFullError"]

#: Documents that a stage may be ahead of the next; each may have `max_document_bytes`.
_DOCUMENTS_AHEAD = 4
#: Chunks in hand: one is computed while the blocks of the other are stored.
_CHUNKS_IN_HAND = 2


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
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """kinds: the blocks to make of a chunk. `is_stored` asks the durable tiers for a key.

        elsewhere: what makes blocks instead of this process.
        """
        self._corpus, self._kinds = corpus, kinds
        self._references, self._is_stored = references, is_stored
        self._shard, self._rebuild = shard or Shard(), rebuild
        self._elsewhere, self._maker = elsewhere, Maker(is_stored)
        self._progress = Progress()
        #: Held while the numbers are changed.
        self._counting = threading.Lock()
        self._begun_s: float | None = None

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
            WorkersError: what makes blocks elsewhere did not do so.
        """
        progress = self._progress
        with Stages() as stages:
            chunk_ids = self._all() if documents is None else self._added(documents, stages)
            if self._elsewhere is None:
                self._compute(chunk_ids, report, cancelled)
            else:
                self._have_made(self._elsewhere, chunk_ids, report, cancelled)
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
        lacking = self._lacking(chunk_id)
        for wanted in lacking or ():
            self._spent(self._maker.make(wanted))
        self._done(stored_before=lacking == [])

    def _have_made(
        self,
        elsewhere: Elsewhere,
        chunk_ids: Iterator[int | None],
        report: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        handed, due = Handed(self._is_stored), Counter[int]()

        def given_up() -> bool:
            self._progress.cancelled = self._progress.cancelled or cancelled()
            return self._progress.cancelled

        def all_lacking() -> Iterator[Wanted]:
            for chunk_id in chunk_ids:
                if given_up():
                    return
                if chunk_id is not None:
                    lacking = self._lacking(chunk_id)
                    new = [wanted for wanted in lacking or () if handed.add(wanted)]
                    if new:
                        due[chunk_id] = len(new)
                        yield from new
                    else:  # here, or under way for an equal chunk
                        self._done(stored_before=lacking is not None)
                report(self._progress)

        # Closed at once, also where a report ends the job: the workers are then free for others.
        with closing(elsewhere.make(all_lacking(), given_up)) as all_reports:
            for reports in all_reports:
                for made in reports:
                    chunk_id = handed.take(made)
                    self._spent(made.effort)
                    due[chunk_id] -= 1
                    if not due[chunk_id]:
                        del due[chunk_id]
                        self._done(stored_before=False)
                report(self._progress)
        if not self._progress.cancelled:
            handed.check()

    def _lacking(self, chunk_id: int) -> list[Wanted] | None:
        """The blocks that no durable tier has; None if the chunk was deleted meanwhile."""
        token_ids = self._corpus.token_ids(chunk_id)
        if token_ids is None:
            return None
        wanted = [Wanted(chunk_id, blocks, token_ids) for blocks in self._kinds(token_ids)]
        for item in wanted:
            # The reference comes first: a block without one may be evicted, a reference without its
            # block only means that the block is computed when it is wanted.
            if not self._references.add(item.key, chunk_id, item.blocks.scope):
                return None
        return [item for item in wanted if not self._is_stored(item.key)]

    def _done(self, *, stored_before: bool) -> None:
        with self._counting:
            self._progress.chunks_stored_before += stored_before
            self._progress.chunks_done += 1

    def _spent(self, effort: Effort) -> None:
        progress = self._progress
        with self._counting:
            progress.tokens_computed += effort.tokens
            progress.bytes_written += effort.nbytes
            progress.compute_s += effort.compute_s
            if effort.begun_s is not None:
                begun_s = effort.begun_s if self._begun_s is None else self._begun_s
                self._begun_s = min(begun_s, effort.begun_s)
            if effort.ended_s is not None and self._begun_s is not None:
                progress.seconds = max(progress.seconds, effort.ended_s - self._begun_s)
