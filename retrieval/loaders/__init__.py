"""Files into documents: text, Markdown, HTML, PDF, JSONL (one document a line) and Parquet.

One bad file, or one bad line, never stops a load: it comes out as `Skipped` with the reason, in its
place among the documents. Only a path that does not exist is an error, before anything is loaded.
A new kind is a file here and a line in `kinds`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..documents import MAX_DOCUMENT_BYTES, Document
from ..errors import DocumentError, MissingExtraError
from .file import File, Limits, ReadWhole, Skipped, reason
from .foreign import documents_from
from .kinds import loader_of
from .places import Place, places

__all__ = ["ReadWhole", "Skipped", "documents_from", "load", "read"]


def load(
    paths: Iterable[Path | str],
    *,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    encoding: str | None = None,
) -> Iterator[Document | Skipped]:
    """Yield the documents of `paths` in order; folders are walked in sorted order.

    A path is a file, a folder, a pattern (`docs/**/*.md`) or a URL that fsspec knows
    (`zip://**::a.zip`). Hidden files and folders inside a folder are ignored; a hidden path given
    by name is loaded. Symbolic links are followed, each folder once. `max_bytes` bounds a file that
    is one document, and the *line* of a JSONL file: those are streamed and may be of any length.
    `encoding` is that of text that is not UTF-8; None has it guessed, if that is nearly certain.

    Raises:
        DocumentError: before the first document, for a path that does not exist.
        MissingExtraError: for a URL, without fsspec or its plugin. A file whose library is not
            installed is skipped, and the reason names the extra.
    """
    items = read(paths, max_bytes=max_bytes, encoding=encoding)
    return (item for item in items if not isinstance(item, ReadWhole))


def read(
    paths: Iterable[Path | str],
    *,
    max_bytes: int = MAX_DOCUMENT_BYTES,
    encoding: str | None = None,
) -> Iterator[Document | Skipped | ReadWhole]:
    """As `load`, and behind each file that came without loss a `ReadWhole`.

    A corpus that is given that drops what the file held before and no longer holds.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"load takes several paths, got one: use load([{str(paths)!r}])")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    try:
        "".encode(encoding or "utf-8")
    except LookupError as exc:
        raise DocumentError(f"unknown encoding {encoding!r}") from exc
    given = [places(path) for path in paths]
    limits = Limits(max_bytes, encoding)

    def items() -> Iterator[Document | Skipped | ReadWhole]:
        seen_folders: set[tuple[int, int]] = set()
        for files in given:
            for place in files(seen_folders):
                if isinstance(place, Skipped):
                    yield place
                else:
                    yield from _read(place, limits)

    return items()


def _read(place: Place, limits: Limits) -> Iterator[Document | Skipped | ReadWhole]:
    whole = True
    try:
        with place.open() as stream:
            file = File(place.source, place.origin, place.name, stream, limits)
            for item in loader_of(file)(file):
                whole &= not isinstance(item, Skipped)
                yield item
    except (OSError, DocumentError, MissingExtraError) as exc:
        yield Skipped(place.source, reason(exc))
    else:
        if whole:
            yield ReadWhole(place.origin)
