"""What a loader is given, and what it yields besides documents."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..documents import MAX_DOCUMENT_BYTES, Document
from ..errors import DocumentError

__all__ = ["File", "Limits", "Loader", "ReadWhole", "Skipped", "reason", "shown", "without_secrets"]

#: Of such an address, what stands before the host may be a password.
_USER = re.compile(r"(?<=://)[^/@\s]*@")


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that was not loaded: `source` is a path or URL, perhaps with `:line`."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReadWhole:
    """All documents of a file have come, and nothing of it was skipped.

    What the corpus holds of this `origin` and did not come is no longer in it.
    """

    origin: str


@dataclass(frozen=True, slots=True)
class Limits:
    """nbytes: of a file that is one document, or of a line. encoding: of text that is not UTF-8."""

    nbytes: int = MAX_DOCUMENT_BYTES
    encoding: str | None = None


@dataclass(frozen=True, slots=True)
class File:
    """An open file. source, origin: as a `Document` has them. name: the last part of its path.

    `stream` is at its beginning and can seek.
    """

    source: str
    origin: str
    name: str
    stream: BinaryIO
    limits: Limits

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    @property
    def stem(self) -> str:
        """A title for a document that has none."""
        return PurePosixPath(self.name).stem

    def document(self, text: str, title: str, metadata: dict[str, Any] | None = None) -> Document:
        """The file as one document; `title` may be empty."""
        return Document(text, title or self.stem, self.source, metadata, self.origin)

    def check_size(self, text: object) -> None:
        """Raise DocumentError for a text, one of the file's many, that is beyond the limit."""
        if isinstance(text, str) and len(text.encode()) > self.limits.nbytes:
            raise DocumentError(f"the text has more than {self.limits.nbytes} bytes")

    def read(self) -> bytes:
        """All of it. Raises DocumentError if that is more than the limit, without reading it."""
        nbytes = self.limits.nbytes
        # One byte more than allowed tells a longer file, also one that grows while it is read.
        data = self.stream.read(nbytes + 1)
        if len(data) > nbytes:
            raise DocumentError(f"more than {nbytes} bytes")
        return data


#: Yields documents as they are read. What it raises ends this file alone.
Loader = Callable[[File], Iterator[Document | Skipped]]


def shown(path: Path) -> str:
    """`path` as valid Unicode, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "replace")


def without_secrets(url: str) -> str:
    """A URL without the user and password that it may carry."""
    return _USER.sub("", url)


def reason(exc: BaseException) -> str:
    """An exception in one clause."""
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc) or type(exc).__name__
