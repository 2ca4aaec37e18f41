"""Retrieval and store joined: chunks come back with a handle on their stored KV."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

from kvrag.blocks import ChunkBlocks, PlacedBlocks
from kvrag.errors import ClosedError, InputError
from kvrag.prefill import ContextChunk
from kvrag.retrieval.records import StoredDocument
from kvrag.searching import Search
from kvrag.store.errors import StoreError
from kvrag.store.keys import BlockKey
from kvrag.store.tiered import BlockReader
from kvrag.text import check_text

__all__ = ["HandleState", "KVHandle", "KVRetriever", "RetrievedChunk", "with_documents"]

HandleState = Literal["missing", "stored", "loading", "loaded", "released"]


class KVHandle:
    """A lightweight id of one chunk's KV that knows its tier and state. Thread-safe.

    The KV is the one for the chunk's place among those it was retrieved with.

    A prefetched block is held until `release`, `cancel`, or the retriever's time is over.
    """

    def __init__(
        self,
        blocks: ChunkBlocks,
        token_ids: Sequence[int],
        tier: str | None,
    ) -> None:
        self._blocks, self._token_ids = blocks, tuple(token_ids)
        self.key: BlockKey = blocks.key(token_ids)
        self._tier = tier
        self._lock = threading.Lock()
        self._reader: BlockReader | None = None
        self._loading: Future[None] | None = None
        self._released = False

    def __repr__(self) -> str:
        return f"KVHandle({str(self.key)!r}, tier={self.tier!r}, state={self.state!r})"

    @property
    def tier(self) -> str | None:
        """The fastest tier that held the block when it was last looked at; None for none."""
        with self._lock:
            return self._reader.tier if self._reader is not None else self._tier

    @property
    def state(self) -> HandleState:
        with self._lock:
            if self._released:
                return "released"
            if self._loading is not None and not self._loading.done():
                return "loading"
            if self._reader is not None:
                return "loaded"
            return "missing" if self._tier is None else "stored"

    def prefetch(self, pool: ThreadPoolExecutor) -> None:
        """Begin to load and verify the block in the background; a second call does nothing."""
        with self._lock:
            if self._released or self._loading is not None:
                return
            self._loading = pool.submit(self._load)

    def cancel(self) -> None:
        """Stop a load that has not begun and release; what is being read is finished first."""
        with self._lock:
            loading = self._loading
        if loading is not None:
            loading.cancel()
        self.release()

    def release(self) -> None:
        """Drop the pin. A second call does nothing."""
        with self._lock:
            self._released = True
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def _load(self) -> None:
        try:
            reader = self._blocks.open(self._token_ids, whole=True)
            if reader is None:
                with self._lock:
                    self._tier = None
                return
            with self._lock:
                keep = not self._released
                if keep:
                    self._reader = reader
            if not keep:
                reader.close()
                return
            reader.read(0, len(reader.header.segments))
        except StoreError:
            # A damaged or vanished block is a miss: the request that wants it computes it.
            self.release()
        except BaseException:
            self.release()
            raise


@dataclass(frozen=True, slots=True)
class RetrievedChunk:
    """A chunk with how it was found, the score it was ranked by, and a handle on its stored KV.

    score: cosine similarity of a dense search, BM25 of a lexical one, fused ranks of a hybrid one,
    where 1 is first by meaning and by words. `chunk.match` has ranks and scores of both.
    """

    chunk: ContextChunk
    score: float
    handle: KVHandle


class Finder(Protocol):
    """Finds chunks: the corpus, as the retriever sees it."""

    def search(self, question: str, k: int, search: Search) -> list[ContextChunk]: ...


def with_documents(
    found: Sequence[RetrievedChunk], document: Callable[[str], StoredDocument | None]
) -> list[tuple[RetrievedChunk, StoredDocument]]:
    """Each chunk with its document, which is looked up once; without what was deleted meanwhile."""
    ids = {item.chunk.document for item in found}
    stored = {id: document(id) for id in ids if id is not None}
    pairs = ((item, stored.get(item.chunk.document or "")) for item in found)
    return [(item, of) for item, of in pairs if of is not None]


class KVRetriever:
    """`retrieve(question, k)` over one corpus. Thread-safe."""

    def __init__(
        self,
        corpus: Finder,
        blocks: PlacedBlocks,
        locate: Callable[[Sequence[BlockKey]], list[str | None]],
        *,
        ttl_s: float = 60.0,
    ) -> None:
        self._corpus, self._blocks, self._locate = corpus, blocks, locate
        self._ttl_s = ttl_s
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="kvrag-prefetch")
        self._lock = threading.Lock()
        self._held: dict[threading.Timer, list[KVHandle]] = {}
        self._closed = False

    def retrieve(
        self, question: str, k: int, search: Search, *, prefetch: bool = False
    ) -> list[RetrievedChunk]:
        """The `k` best chunks for the question, best first; fewer if fewer are found.

        Args:
            search: with nothing left open.
            prefetch: begin to load the blocks into the fastest tier at once.

        Raises:
            InputError: an empty question, k below 1, or an empty corpus.
        """
        if not check_text("the question", question).strip():
            raise InputError("the question is empty")
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise InputError(f"k is {k!r}; it must be a whole number, at least 1")
        chunks = self._corpus.search(question, k, search)
        chosen = self._blocks.choose([chunk.token_ids for chunk in chunks])
        keys = [kind.key(chunk.token_ids) for kind, chunk in zip(chosen, chunks, strict=True)]
        found = []
        for chunk, blocks, tier in zip(chunks, chosen, self._locate(keys), strict=True):
            handle = KVHandle(blocks, chunk.token_ids, tier)
            found.append(RetrievedChunk(chunk, chunk.score or 0.0, handle))
        if prefetch:
            self._hold([item.handle for item in found])
        return found

    def close(self) -> None:
        """Release all handles. A second call does nothing."""
        with self._lock:
            self._closed = True
            held, self._held = self._held, {}
        for timer, handles in held.items():
            timer.cancel()
            for handle in handles:
                handle.cancel()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _hold(self, handles: list[KVHandle]) -> None:
        """Load the blocks, and release them when nobody has come for them in `ttl_s`."""

        def expire() -> None:
            with self._lock:
                self._held.pop(timer, None)
            for handle in handles:
                handle.cancel()

        timer = threading.Timer(self._ttl_s, expire)
        timer.daemon = True
        with self._lock:
            if self._closed:
                raise ClosedError("the engine is closed")
            self._held[timer] = handles
            for handle in handles:
                handle.prefetch(self._pool)
        timer.start()
