"""HTML: the text that a reader sees, in paragraphs; one document a file."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..documents import Document
from ..errors import DocumentError, needs_extra
from .encoding import decode
from .file import File, reason

__all__ = ["load_html"]

#: <meta charset="…">, <meta … content="text/html; charset=…">, <?xml … encoding="…"?>
_DECLARED = re.compile(rb"(?:charset|encoding)\s*=\s*[\"']?\s*([A-Za-z0-9._:-]{2,40})")
_HEAD_BYTES = 4096
#: Where a page leads is not what it says, and its title stands in the document's.
_LEFT_OUT = ("nav", "title")


def load_html(file: File) -> Iterator[Document]:
    """Its <title>, and its text without scripts, styles, comments and <nav>.

    Raises:
        DocumentError: no text, or a page nested so deeply that it cannot be walked.
        MissingExtraError: html-text is not installed.
    """
    with needs_extra("html-text", "HTML", extra="documents"):
        import html_text
        from lxml import etree, html
    data = file.read()
    encoding = file.limits.encoding
    if encoding is None and (declared := _DECLARED.search(data[:_HEAD_BYTES])):
        encoding = declared[1].decode("ascii")
    text = decode(data, encoding)
    if not text.strip():
        raise DocumentError("empty")
    try:
        # lxml takes a declaration in a string for a contradiction, and one in bytes for the truth.
        page = html.document_fromstring(text.encode(), parser=html.HTMLParser(encoding="utf-8"))
        title = page.findtext(".//title") or page.findtext(".//h1") or ""
        for element in list(page.iter(*_LEFT_OUT)):
            element.drop_tree()
        body = html_text.extract_text(page)
    except RecursionError as exc:
        raise DocumentError("not HTML that can be read: nested too deeply") from exc
    except (etree.LxmlError, ValueError) as exc:
        raise DocumentError(f"not HTML that can be read: {reason(exc)}") from exc
    if not body.strip():
        raise DocumentError("no text")
    yield file.document(body, title.strip())
