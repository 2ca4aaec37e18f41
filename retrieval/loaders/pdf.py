"""PDF: the text of all its pages; one document a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from ..documents import Document
from ..errors import DocumentError, needs_extra
from .file import File, reason

__all__ = ["load_pdf"]

_log = logging.getLogger(__name__)


def load_pdf(file: File) -> Iterator[Document]:
    """Pages with an empty line between them; the title is the file's own, if it has one.

    A page that cannot be read is left out, told of in a warning and listed in the metadata.

    Raises:
        DocumentError: no PDF that can be read, one that needs a password, or one without text.
        MissingExtraError: pypdf is not installed.
    """
    with needs_extra("pypdf", "PDF", extra="documents"):
        import pypdf
    # What it thinks of a file's syntax is for nobody who cannot mend it.
    logging.getLogger("pypdf").addHandler(logging.NullHandler())
    file.read()
    file.stream.seek(0)
    try:
        reader = pypdf.PdfReader(file.stream)
        _unlock(reader)
        num_pages = len(reader.pages)
        pages, unreadable = _texts(reader, num_pages, file)
        title = _title(reader)
    except DocumentError:
        raise
    except pypdf.errors.DependencyError as exc:
        raise DocumentError(f"encrypted in a way that needs more: {reason(exc)}") from exc
    except Exception as exc:  # a damaged file makes the library raise whatever its parts raise
        raise DocumentError(f"not a PDF that can be read: {reason(exc)}") from exc
    text = "\n\n".join(pages)
    if not text:
        if unreadable:
            raise DocumentError(f"none of its {num_pages} pages can be read")
        raise DocumentError(f"no text in its {num_pages} pages: perhaps they are pictures")
    metadata: dict[str, Any] = {"pages": num_pages}
    if unreadable:
        metadata["unreadable_pages"] = unreadable
    yield file.document(text, title, metadata)


def _texts(reader: Any, num_pages: int, file: File) -> tuple[list[str], list[int]]:
    """Texts of the pages that have some, and the numbers of those that cannot be read."""
    texts: list[str] = []
    unreadable: list[int] = []
    nbytes = 0
    for number in range(1, num_pages + 1):
        try:
            # Fonts without a table of their letters give halves of pairs, which are no text.
            text = reader.pages[number - 1].extract_text().encode("utf-8", "replace").decode()
        except Exception as exc:  # as above: one page's stream may be damaged
            _log.warning("%s: page %d cannot be read: %s", file.source, number, reason(exc))
            unreadable.append(number)
            continue
        if text := text.replace("\0", "").strip():
            texts.append(text)
            nbytes += len(text.encode())
            if nbytes > file.limits.nbytes:
                raise DocumentError(f"more than {file.limits.nbytes} bytes of text")
    return texts, unreadable


def _unlock(reader: Any) -> None:
    if reader.is_encrypted and not reader.decrypt(""):
        raise DocumentError("encrypted: it needs a password")


def _title(reader: Any) -> str:
    try:
        title = reader.metadata.title if reader.metadata is not None else ""
    except Exception:  # as above; a file without a title is as good
        return ""
    return str(title or "").encode("utf-8", "replace").decode().replace("\0", "").strip()
