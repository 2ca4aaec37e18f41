"""Documents of other libraries' loaders, known by what they have: LangChain's, LlamaIndex's, dicts.

engine.add(documents_from(PyPDFLoader("report.pdf").lazy_load()))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..documents import Document
from ..errors import DocumentError
from .file import Skipped, reason

__all__ = ["documents_from"]

_TITLES = ("title",)
_SOURCES = ("source", "file_path", "url", "file_name")


def documents_from(items: Iterable[object]) -> Iterator[Document | Skipped]:
    """Yield a document an item, one at a time; what is none is `Skipped`, by its number from 1.

    An item is a `Document`, a text, a mapping with `text`, or an object with `page_content`
    (LangChain) or `text` (LlamaIndex) beside `metadata`. Its metadata may name `title`, and the
    source as `source`, `file_path`, `url` or `file_name`.
    """
    for number, item in enumerate(items, start=1):
        if isinstance(item, Document | Skipped):
            yield item
            continue
        try:
            yield _document(item)
        except DocumentError as exc:
            yield Skipped(f"item {number}", reason(exc))


def _document(item: object) -> Document:
    text: Any
    fields: Any = {}
    if isinstance(item, str):
        text = item
    elif isinstance(item, Mapping):
        text = item.get("text", item.get("page_content"))
        others = {k: v for k, v in item.items() if k not in ("text", "page_content", "metadata")}
        fields = others | dict(item.get("metadata") or {})
    else:
        text = getattr(item, "page_content", None)
        text = getattr(item, "text", None) if text is None else text
        fields = getattr(item, "metadata", None) or {}
    if not isinstance(text, str):
        raise DocumentError(f"no text in {type(item).__name__}")
    try:
        # Dates, paths and the like become text; a loader's metadata is for people.
        metadata = json.loads(json.dumps(dict(fields), default=str))
    except (TypeError, ValueError, RecursionError) as exc:
        raise DocumentError(f"metadata cannot be kept: {exc}") from exc
    return Document(
        text=text,
        title=_first(metadata, _TITLES),
        source=_first(metadata, _SOURCES),
        metadata=metadata or None,
    )


def _first(metadata: Mapping[str, Any], names: Iterable[str]) -> str:
    return next((metadata[name] for name in names if isinstance(metadata.get(name), str)), "")
