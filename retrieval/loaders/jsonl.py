"""JSONL: one document a line; read line by line, so that a file may be of any length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..documents import Document
from ..errors import DocumentError
from .file import File, Skipped, reason

__all__ = ["document_of", "load_jsonl"]

_SNIFF_BYTES = 8192
_OWN_FIELDS = frozenset({"text", "title", "metadata"})


def load_jsonl(file: File) -> Iterator[Document | Skipped]:
    """A document a line; what is wrong with one line costs that line."""
    stream, max_bytes = file.stream, file.limits.nbytes
    if b"\0" in stream.read(_SNIFF_BYTES):
        raise DocumentError("binary: it holds NUL bytes")
    stream.seek(0)
    number = 0
    empty = True
    while line := stream.readline(max_bytes + 1):
        number += 1
        source = f"{file.source}:{number}"
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            empty = False
            yield Skipped(source, f"the line has more than {max_bytes} bytes")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        empty = False
        try:
            document = _document_from_line(line, source, file.origin)
        except DocumentError as exc:
            yield Skipped(source, reason(exc))
        else:
            yield document
    if empty:
        raise DocumentError("empty")


def _document_from_line(line: bytes, source: str, origin: str) -> Document:
    try:
        fields: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise DocumentError(f"not UTF-8: byte {exc.start} is {line[exc.start]:#04x}") from exc
    except RecursionError as exc:
        raise DocumentError("not JSON that can be read: nested too deeply") from exc
    except ValueError as exc:
        raise DocumentError(f"not JSON: {exc}") from exc
    return document_of(fields, source, origin)


def document_of(fields: Any, source: str, origin: str) -> Document:
    """`{"text": …, "title": …, "metadata": {…}, …}` as a document; further fields are metadata.

    Raises DocumentError with the reason for anything else.
    """
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
    return Document(text, title or "", source, merged or None, origin)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
