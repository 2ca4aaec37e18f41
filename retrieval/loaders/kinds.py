"""Which loader reads a file: told by its content, and by its name only where content says text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import DocumentError
from .file import File, Loader
from .html import load_html
from .jsonl import load_jsonl
from .parquet import load_parquet
from .pdf import load_pdf
from .text import load_markdown, load_text

__all__ = ["loader_of"]

_HEAD_BYTES = 1024
#: Space, byte order mark, XML declaration and comments may stand before a page's beginning.
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?(?:\s|<\?xml.*?\?>|<!--.*?-->)*<(?:!doctype\s+html|html)\b")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file. begins: whether a file's first bytes are those of one; None: any text is."""

    name: str
    suffixes: frozenset[str]
    load: Loader
    begins: Callable[[bytes], bool] | None = None


_KINDS = (
    Kind("PDF", frozenset({".pdf"}), load_pdf, lambda head: b"%PDF-" in head),
    Kind("Parquet", frozenset({".parquet"}), load_parquet, lambda head: head[:4] == b"PAR1"),
    Kind(
        "HTML",
        frozenset({".html", ".htm", ".xhtml"}),
        load_html,
        lambda head: _PAGE.match(head.lower()) is not None,
    ),
    Kind("text", frozenset({".txt", ".text"}), load_text),
    Kind("Markdown", frozenset({".md", ".markdown"}), load_markdown),
    Kind("JSONL", frozenset({".jsonl"}), load_jsonl),
)
_TEXTS = frozenset({"text", "Markdown", "JSONL", "HTML"})
#: What people take for documents, by its first bytes.
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive or an office document; zip://*::PATH reads an archive's files",
    b"\x1f\x8b": "compressed by gzip",
    b"\xd0\xcf\x11\xe0": "an old office document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"{\\rtf": "RTF",
}


def loader_of(file: File) -> Loader:
    """The loader for `file`, which is at its beginning again.

    A PDF is one under any name. Text is read as its name says.

    Raises:
        DocumentError: of a kind that is not read, or not of the kind that its name says.
    """
    head = file.stream.read(_HEAD_BYTES)
    file.stream.seek(0)
    for kind in _KINDS:
        if kind.begins is not None and kind.begins(head):
            return kind.load
    what = next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None)
    if what is not None:
        raise DocumentError(f"not a document that is read: {what}")
    named = next((kind for kind in _KINDS if file.suffix in kind.suffixes), None)
    if named is None:
        known = ", ".join(sorted(suffix for kind in _KINDS for suffix in kind.suffixes))
        raise DocumentError(f"unknown suffix {file.suffix!r}; known are {known}")
    if named.name not in _TEXTS:
        raise DocumentError(f"named {file.suffix}, but no {named.name}")
    return named.load
