"""Files into documents: .txt and .text, .md and .markdown, .jsonl (one document a line).

One bad file, or one bad line, never stops a load: it comes out as `Skipped` with the reason, in its
place among the documents. Only a path that does not exist is an error, before anything is loaded.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ._jsonl import document_from_line
from ._walk import walk
from .documents import MAX_DOCUMENT_BYTES, Document
from .errors import DocumentError

__all__ = ["Skipped", "load"]

_TEXT = frozenset({".txt", ".text"})
_MARKDOWN = frozenset({".md", ".markdown"})
_JSONL = frozenset({".jsonl"})
_SNIFF_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that was not loaded: `source` is a path, or `path:line` in a JSONL file."""

    source: str
    reason: str


def load(
    paths: Iterable[Path | str], *, max_bytes: int = MAX_DOCUMENT_BYTES
) -> Iterator[Document | Skipped]:
    """Yield the documents of `paths` in order; folders are walked in sorted order.

    Hidden files and folders inside a folder are ignored; a hidden path given by name is loaded.
    Symbolic links are followed, each folder once. `max_bytes` bounds a text file, and a *line* of a
    JSONL file: those are streamed and may be of any length.

    Raises DocumentError, before the first document, for a path that does not exist.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"load takes several paths, got one: use load([{str(paths)!r}])")
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    roots = [Path(path) for path in paths]
    for root in roots:
        # A broken link does exist: it is skipped later, like any other unreadable file.
        try:
            os.lstat(root)
        except (OSError, ValueError) as exc:
            raise DocumentError(f"{shown(root)} cannot be loaded: {_reason(exc)}") from exc
    return _load(roots, max_bytes)


def shown(path: Path) -> str:
    """`path` as valid Unicode, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "replace")


def _load(roots: list[Path], max_bytes: int) -> Iterator[Document | Skipped]:
    seen_folders: set[tuple[int, int]] = set()
    for root in roots:
        for path, problem in walk(root, seen_folders):
            if problem is not None:
                yield Skipped(shown(path), _reason(problem))
                continue
            yield from _load_file(path, max_bytes)


def _load_file(path: Path, max_bytes: int) -> Iterator[Document | Skipped]:
    source = shown(path)
    suffix = path.suffix.lower()
    if suffix not in _TEXT | _MARKDOWN | _JSONL:
        known = ", ".join(sorted(_TEXT | _MARKDOWN | _JSONL))
        yield Skipped(source, f"unknown suffix {suffix!r}; known are {known}")
        return
    try:
        with _open_regular(path) as file:
            if suffix in _JSONL:
                yield from _jsonl_documents(file, source, max_bytes)
            else:
                yield _text_document(file, path, source, max_bytes)
    except (OSError, DocumentError) as exc:
        yield Skipped(source, _reason(exc))


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe, a socket or a device is refused and never waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DocumentError("not a regular file")
    # Between stat and open the path may have become a pipe, and opening one blocks.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise DocumentError("not a regular file")
    return file


def _text_document(file: BinaryIO, path: Path, source: str, max_bytes: int) -> Document:
    nbytes = os.fstat(file.fileno()).st_size
    # One byte more than allowed, for a file that grows while it is read.
    data = file.read(max_bytes + 1) if nbytes <= max_bytes else None
    if data is None or len(data) > max_bytes:
        raise DocumentError(f"more than {max_bytes} bytes")
    if b"\0" in data:
        raise DocumentError("binary: it holds NUL bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DocumentError(f"not UTF-8: byte {exc.start} is {data[exc.start]:#04x}") from exc
    title = _markdown_title(text) if path.suffix.lower() in _MARKDOWN else ""
    return Document(text=text, title=title or shown(Path(path.stem)), source=source)


def _markdown_title(text: str) -> str:
    """The front matter's `title:`, else the first level-1 heading outside fenced code, else ""."""
    lines = iter(text.splitlines())
    fence = ""
    in_front_matter = False
    for number, line in enumerate(lines):
        if number == 0 and line.rstrip() == "---":
            in_front_matter = True
        elif in_front_matter:
            if line.rstrip() in ("---", "..."):
                in_front_matter = False
            elif line.startswith("title:"):
                title = line.removeprefix("title:").strip().strip("\"'").strip()
                if title:
                    return title
        elif fence:
            if line.lstrip().startswith(fence):
                fence = ""
        elif line.lstrip().startswith(("```", "~~~")):
            fence = line.lstrip()[:3]
        elif line.startswith("# "):
            return line.removeprefix("# ").strip().rstrip("#").rstrip()
    return ""


def _jsonl_documents(file: BinaryIO, source: str, max_bytes: int) -> Iterator[Document | Skipped]:
    if b"\0" in file.read(_SNIFF_BYTES):
        raise DocumentError("binary: it holds NUL bytes")
    file.seek(0)
    number = 0
    num_documents = 0
    num_skipped = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        where = f"{source}:{number}"
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            num_skipped += 1
            yield Skipped(where, f"the line has more than {max_bytes} bytes")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            document = document_from_line(line, where)
        except DocumentError as exc:
            num_skipped += 1
            yield Skipped(where, _reason(exc))
        else:
            num_documents += 1
            yield document
    if not num_documents and not num_skipped:
        raise DocumentError("empty")


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc) or type(exc).__name__
