"""One line of a JSONL file into a document."""

from __future__ import annotations

import json
from typing import Any

from .documents import Document
from .errors import DocumentError

_OWN_FIELDS = frozenset({"text", "title", "metadata"})


def document_from_line(line: bytes, source: str) -> Document:
    """`{"text": …, "title": …, "metadata": {…}, …}` as a document; further fields are metadata.

    Raises DocumentError with the reason for anything else.
    """
    try:
        fields: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise DocumentError(f"not UTF-8: byte {exc.start} is {line[exc.start]:#04x}") from exc
    except RecursionError as exc:
        raise DocumentError("not JSON that can be read: nested too deeply") from exc
    except ValueError as exc:
        raise DocumentError(f"not JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise DocumentError(f"a JSON object is needed, got {_kind(fields)}")
    if "text" not in fields:
        raise DocumentError('the field "text" is missing')
    text = fields["text"]
    title = fields.get("title")
    metadata = fields.get("metadata")
    if not isinstance(text, str):
        raise DocumentError(f'"text" must be a string, got {_kind(text)}')
    if title is not None and not isinstance(title, str):
        raise DocumentError(f'"title" must be a string, got {_kind(title)}')
    if metadata is not None and not isinstance(metadata, dict):
        raise DocumentError(f'"metadata" must be an object, got {_kind(metadata)}')
    others = {name: value for name, value in fields.items() if name not in _OWN_FIELDS}
    merged = others | (metadata or {})
    return Document(text=text, title=title or "", source=source, metadata=merged or None)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
