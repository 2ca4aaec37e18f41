"""Where a job stands, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvrag.retrieval.loaders import Skipped

__all__ = ["Progress"]


@dataclass(slots=True)
class Progress:
    """Counts of one run.

    documents_elsewhere: left to other shards. documents_replaced: gone because their file holds
    them no longer, or because another content came under their id, which counts as added, too.
    documents_vanished: gone because their file is. total_chunks, of the documents that the job was
    given, is known when all of them are added. seconds: from the first block that had to be
    computed to the last that was stored; compute_s: of that, in the model; of several workers,
    added up, and without what one that died could not report any more.
    """

    documents_added: int = 0
    documents_known: int = 0
    documents_elsewhere: int = 0
    documents_replaced: int = 0
    documents_vanished: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    total_chunks: int | None = None
    chunks_done: int = 0
    chunks_stored_before: int = 0
    tokens_computed: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    compute_s: float = 0.0
    cancelled: bool = False

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_computed / self.seconds if self.seconds else 0.0

    @property
    def busy(self) -> float:
        """The share of `seconds` in which the model computed; up to the number of workers."""
        return self.compute_s / self.seconds if self.seconds else 0.0

    @property
    def remaining_s(self) -> float | None:
        """Estimate from the chunks computed so far; None as long as there are none."""
        computed = self.chunks_done - self.chunks_stored_before
        if self.total_chunks is None or computed == 0:
            return None
        return (self.total_chunks - self.chunks_done) * self.seconds / computed
