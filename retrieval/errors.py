"""The errors of the retrieval room.

    RetrievalError
    ├── DocumentError      also ValueError: a document, or a path to one, that cannot be taken
    ├── CatalogError       the SQLite catalog is locked, damaged, read-only, full or too new
    ├── EmbedderError      the embedding model is absent, unusable or gave unusable vectors
    ├── RerankerError      the cross-encoder is absent, unusable or gave unusable scores
    ├── VectorStoreError   a vector store that takes the vector index's place fails
    ├── FilterError        also ValueError: a filter over metadata that cannot be applied
    └── MissingExtraError  also ImportError: an optional library is not installed

What is merely absent is `None`, never an error. A damaged index file is neither: it is rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "CatalogError",
    "DocumentError",
    "EmbedderError",
    "FilterError",
    "MissingExtraError",
    "RerankerError",
    "RetrievalError",
    "VectorStoreError",
]


class RetrievalError(Exception):
    """Root of everything this room raises on purpose."""


class DocumentError(RetrievalError, ValueError):
    """A document, or a path that should hold one, was refused; the message says why."""


class CatalogError(RetrievalError):
    """The catalog could not be opened, read or written; nothing was half-written."""


class EmbedderError(RetrievalError):
    """The embedding model is absent or unusable."""


class RerankerError(RetrievalError):
    """The cross-encoder is absent or unusable."""


class VectorStoreError(RetrievalError):
    """A vector store in the place of the vector index is out, or refuses what it is given."""


class FilterError(RetrievalError, ValueError):
    """A filter over metadata was refused; the message says what is allowed."""


class MissingExtraError(RetrievalError, ImportError):
    """A library of an extra is not installed, or does not import; the message names the extra."""


@contextmanager
def needs_extra(library: str, purpose: str, *, extra: str = "retrieval") -> Iterator[None]:
    """Turn an ImportError of `library` inside the block into one that names the extra."""
    try:
        yield
    except ImportError as exc:
        raise MissingExtraError(
            f"{purpose} needs {library}, which does not import ({exc}); "
            f"install it with: pip install 'kvrag[{extra}]'"
        ) from exc
