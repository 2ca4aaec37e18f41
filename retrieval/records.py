"""What goes into the catalog and comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ChunkInput",
    "Counts",
    "DeletedDocument",
    "DocumentCopy",
    "StoredChunk",
    "StoredDocument",
]


@dataclass(frozen=True, slots=True)
class ChunkInput:
    """A chunk to be stored: its title and text, and the token ids of the rendered chunk."""

    title: str
    text: str
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A chunk of the catalog. `id` is never used again, not even after the chunk is deleted."""

    id: int
    namespace: str
    document_id: str
    ordinal: int
    title: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document of the catalog, without its text; `added_at` is in seconds since 1970, UTC."""

    id: str
    namespace: str
    title: str
    source: str
    metadata: dict[str, Any] | None
    added_at: float
    num_chunks: int


@dataclass(frozen=True, slots=True)
class DeletedDocument:
    """What went with a document: its chunks, and the blocks that nothing refers to any more."""

    chunk_ids: tuple[int, ...]
    orphaned_block_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of a namespace, or of the whole catalog."""

    documents: int
    chunks: int
    vectors: int
    blocks: int


@dataclass(frozen=True, slots=True)
class DocumentCopy:
    """A document of one catalog on its way into another, with all that belongs to it.

    text: of a document that its user named, else None. vectors: (len(chunks), dim) float32.
    blocks: for each chunk the (scope, block key) that it refers to.
    """

    id: str
    title: str
    source: str
    metadata: dict[str, Any] | None
    added_at: float
    text: str | None
    origins: Sequence[str]
    chunks: Sequence[ChunkInput]
    vectors: npt.NDArray[np.float32]
    blocks: Sequence[Sequence[tuple[str, str]]]
