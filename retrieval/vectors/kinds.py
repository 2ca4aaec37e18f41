"""Which kind of index a number of vectors is held by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from .base import IndexKind, Source, Structure
from .flat import Flat
from .hnsw import Hnsw
from .ivfpq import LEAST_VECTORS, IvfPq

__all__ = ["IndexChoice", "IndexRule", "build", "opened"]

IndexChoice = Literal["auto", "flat", "hnsw", "ivfpq"]


@dataclass(frozen=True, slots=True)
class IndexRule:
    """What an index is made as, and when it is made or written anew.

    choice:        a kind, or auto, which goes by the number of vectors
    hnsw_from:     where auto leaves flat for hnsw; it goes back below half of that
    ivfpq_from:    the same between hnsw and ivfpq
    dead_share:    of deleted vectors, from which on an index is made anew
    written_share: of changes, from which on the file is written, and
    written_most:  their number from which on it is, whatever share that may be

    Raises:
        ValueError: an unknown choice, or numbers out of order.
    """

    choice: IndexChoice = "auto"
    hnsw_from: int = 50_000
    ivfpq_from: int = 2_000_000
    dead_share: float = 0.2
    written_share: float = 0.05
    written_most: int = 10_000

    def __post_init__(self) -> None:
        """Check the choice and the order of the numbers."""
        if self.choice not in get_args(IndexChoice):
            raise ValueError(
                f"index is {self.choice!r:.80}; allowed are {', '.join(get_args(IndexChoice))}"
            )
        if not 0 < self.hnsw_from <= self.ivfpq_from:
            raise ValueError(
                f"hnsw_from must be above 0 and at most ivfpq_from, got {self.hnsw_from} and "
                f"{self.ivfpq_from}"
            )

    def kind(self, count: int, now: IndexKind | None = None) -> IndexKind:
        """The kind for `count` vectors that are held by `now`; None: by nothing yet."""
        if self.choice == "ivfpq" and count < LEAST_VECTORS:
            return "ivfpq" if now == "ivfpq" and count >= LEAST_VECTORS // 2 else "flat"
        if self.choice != "auto":
            return self.choice
        kinds: tuple[IndexKind, ...] = get_args(IndexKind)
        place = (count >= self.hnsw_from) + (count >= self.ivfpq_from)
        if now is not None:
            # Going back has to be worth it: half the number, so that none goes to and fro.
            back = (2 * count >= self.hnsw_from) + (2 * count >= self.ivfpq_from)
            place = max(place, min(kinds.index(now), back))
        return kinds[place]

    def is_due(self, changes: int, count: int) -> bool:
        """Whether a file that `changes` of `count` vectors are not in is to be written."""
        return changes > 0 and changes >= min(self.written_most, self.written_share * count)


def build(faiss: Any, kind: IndexKind, dim: int, source: Source) -> Structure:
    """All of the source's vectors in a structure of that kind."""
    structure: Structure
    if kind == "ivfpq":
        structure = IvfPq.trained(faiss, dim, source)
    else:
        structure = (Flat if kind == "flat" else Hnsw).empty(faiss, dim)
    for vectors in source.batches():
        structure.append(vectors)
    return structure


def opened(faiss: Any, index: Any) -> Structure | None:
    """The structure that a FAISS index was written from; None if it is of no kind known here."""
    for kind in (Flat, Hnsw, IvfPq):
        if kind.fits(faiss, index):
            structure: Structure = kind(faiss, index)
            return structure
    return None
