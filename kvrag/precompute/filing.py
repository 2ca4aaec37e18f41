"""Documents on their way into a corpus: which are new, which are replaced, which are another's.

Knows no KV. Runs beside the computation, and is asked for the chunks that have to have some.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvrag.corpus import Added, ChunkedDocument, Corpus
from kvrag.precompute.progress import Progress
from kvrag.precompute.shard import Shard
from kvrag.references import References
from kvrag.retrieval.documents import Document
from kvrag.retrieval.errors import DocumentError
from kvrag.retrieval.loaders import ReadWhole, Skipped

__all__ = ["Filed", "Filing", "Item"]

#: What a load yields.
Item = Document | Skipped | ReadWhole

#: Vectors are made of so many chunks together.
_BATCH_CHUNKS = 32
#: Known documents, which have none, wait behind no more than this.
_BATCH_ITEMS = 64


@dataclass(frozen=True, slots=True)
class Filed:
    """A document that is in the corpus now, and the ids of its chunks."""

    document_id: str
    chunk_ids: tuple[int, ...]


class Filing:
    """Two stages: `chunked` cuts documents, `filed` embeds and stores them. Each for one thread."""

    def __init__(
        self,
        corpus: Corpus,
        references: References,
        progress: Progress,
        *,
        shard: Shard,
        rebuild: bool,
    ) -> None:
        """rebuild: documents whose chunks would be others today are replaced."""
        self._corpus, self._references, self._progress = corpus, references, progress
        self._shard, self._rebuild = shard, rebuild
        #: What was cut under each id; and the ids met in the files that are being read.
        self._cut: dict[str, str] = {}
        self._met: dict[str, set[str]] = {}

    def chunked(
        self, items: Iterable[Item]
    ) -> Iterator[ChunkedDocument | Document | Skipped | ReadWhole]:
        """Documents that are to be stored come out cut, those that are known as they are."""
        for item in items:
            if not isinstance(item, Document) or not self._shard.owns(item.id):
                yield item
                continue
            cut_before = self._cut.get(item.id)
            self._cut[item.id] = item.digest
            if cut_before == item.digest or (
                cut_before is None and not self._rebuild and self._corpus.holds(item)
            ):
                yield item
            else:
                try:
                    yield self._corpus.chunked(item)
                except DocumentError as exc:
                    yield Skipped(item.source or item.id, str(exc))

    def filed(
        self, items: Iterable[ChunkedDocument | Document | Skipped | ReadWhole]
    ) -> Iterator[Filed | None]:
        """Yield each document once when it is stored, and None for what is none."""
        waiting: list[ChunkedDocument | Document | Skipped | ReadWhole] = []
        num_chunks = 0
        # Growing: the computation waits for the first of them.
        wanted = 1
        done: set[str] = set()
        for item in items:
            waiting.append(item)
            num_chunks += len(item.chunks) if isinstance(item, ChunkedDocument) else 0
            if num_chunks >= wanted or len(waiting) >= _BATCH_ITEMS:
                yield from self._file(waiting, done)
                waiting, num_chunks = [], 0
                wanted = min(2 * wanted, _BATCH_CHUNKS)
        yield from self._file(waiting, done)

    def _file(
        self, items: list[ChunkedDocument | Document | Skipped | ReadWhole], done: set[str]
    ) -> Iterator[Filed | None]:
        """Documents of several files are embedded together; each thing is done in its order."""
        cut = [item for item in items if isinstance(item, ChunkedDocument)]
        outcomes = self._corpus.add(cut, rebuild=self._rebuild)
        for item in items:
            if isinstance(item, ChunkedDocument):
                yield self._stored(item, next(outcomes), done)
            else:
                yield self._other(item, done)

    def _stored(self, item: ChunkedDocument, outcome: Added, done: set[str]) -> Filed:
        self._progress.documents_added += outcome is not Added.KNOWN
        self._progress.documents_known += outcome is Added.KNOWN
        self._progress.documents_replaced += outcome is Added.REPLACED
        self._note(item.document)
        done.add(item.document.id)
        return self._filed(item.document.id)

    def _other(self, item: Document | Skipped | ReadWhole, done: set[str]) -> Filed | None:
        if isinstance(item, Skipped):
            self._progress.skipped.append(item)
        elif isinstance(item, ReadWhole):
            self._drop_others(item.origin)
        elif not self._shard.owns(item.id):
            self._progress.documents_elsewhere += 1
            self._met.setdefault(item.origin, set()).add(item.id)
        elif not self._corpus.holds(item):
            # It did when this was asked, and what came before took it out since.
            return self._added_after_all(item, done)
        else:
            self._progress.documents_known += 1
            self._corpus.describe(item)
            self._note(item)
            if item.id not in done:
                done.add(item.id)
                return self._filed(item.id)
        return None

    def _added_after_all(self, document: Document, done: set[str]) -> Filed | None:
        try:
            item = self._corpus.chunked(document)
        except DocumentError as exc:
            self._progress.skipped.append(Skipped(document.source or document.id, str(exc)))
            return None
        outcome = next(self._corpus.add([item], rebuild=self._rebuild))
        return self._stored(item, outcome, done)

    def _note(self, document: Document) -> None:
        self._corpus.catalog.add_origin(self._corpus.namespace, document.origin, document.id)
        if document.origin:
            self._met.setdefault(document.origin, set()).add(document.id)

    def _filed(self, document_id: str) -> Filed:
        corpus = self._corpus
        chunk_ids = corpus.catalog.document_chunks(corpus.namespace, document_id)
        return Filed(document_id, tuple(chunk_ids))

    def _drop_others(self, origin: str) -> None:
        """The file was read whole: what it held before and did not come is no longer in it."""
        catalog, namespace = self._corpus.catalog, self._corpus.namespace
        held = catalog.documents_from(namespace, origin)
        for document_id in held - self._met.pop(origin, set()):
            if catalog.drop_origin(namespace, origin, document_id):
                self._references.delete_document(namespace, document_id)
                self._progress.documents_replaced += 1
