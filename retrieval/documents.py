"""A document: what a user adds, named by its content or by the user.

Knows nothing of files, chunks or storage.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from .errors import DocumentError

__all__ = ["MAX_DOCUMENT_BYTES", "Document"]

MAX_DOCUMENT_BYTES = 64 << 20
MAX_ID_CHARACTERS = 256
_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a title, where it came from, and free metadata.

    text:     what the model reads, kept as it is; not only whitespace, at most 64 MiB of UTF-8
    title:    one line; runs of whitespace become one space. May be empty
    source:   where it came from, for people; not part of the identity
    metadata: JSON values under string keys; copied, so that later changes do not reach it
    origin:   the file that it came from, under a name that stays; may be empty. A corpus drops what
              a file no longer holds
    id:       32 hex digits, a digest of title and text: same content, same id. Or a given one,
              1 to 256 characters and neither "." nor "..": adding another content under it
              replaces the first
    is_named: whether the id was given

    Raises DocumentError for anything else.
    """

    text: str
    title: str = ""
    source: str = ""
    metadata: dict[str, Any] | None = field(default=None, hash=False)
    origin: str = field(default="", compare=False)
    id: str = field(default="", compare=False)
    is_named: bool = field(init=False, default=False, compare=False)

    def __post_init__(self) -> None:
        """Validate, normalise the title, copy the metadata and compute the id if none is given."""
        for name in ("text", "title", "source", "origin", "id"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise DocumentError(f"{name} must be a string, got {type(value).__name__}")
        if not self.text.strip():
            raise DocumentError("the text is empty or only whitespace")
        title = " ".join(self.title.split())
        text_bytes = _utf8("text", self.text)
        title_bytes = _utf8("title", title)
        _utf8("source", self.source)
        _utf8("origin", self.origin)
        if len(text_bytes) + len(title_bytes) > MAX_DOCUMENT_BYTES:
            raise DocumentError(
                f"the document has {len(text_bytes) + len(title_bytes)} bytes, "
                f"more than the {MAX_DOCUMENT_BYTES} allowed"
            )
        object.__setattr__(self, "title", title)
        object.__setattr__(self, "metadata", _json_copy(self.metadata))
        if self.id:
            _check_id(self.id)
            object.__setattr__(self, "is_named", True)
        else:
            object.__setattr__(self, "id", _digest(title_bytes, text_bytes))

    @property
    def digest(self) -> str:
        """32 hex digits of title and text: the id, unless another was given."""
        return _digest(self.title.encode(), self.text.encode()) if self.is_named else self.id


def _digest(title: bytes, text: bytes) -> str:
    # The length in front keeps ("ab", "c") and ("a", "bc") apart.
    digest = blake2b(len(title).to_bytes(8, "little"), digest_size=_ID_BYTES)
    digest.update(title)
    digest.update(text)
    return digest.hexdigest()


def _check_id(document_id: str) -> None:
    _utf8("id", document_id)
    # The dots are folders in a URL, which clients resolve before they send it.
    if len(document_id) > MAX_ID_CHARACTERS or document_id in (".", ".."):
        raise DocumentError(
            f"the id is {document_id!r:.100}; it must have 1 to {MAX_ID_CHARACTERS} characters, "
            "and must not be '.' or '..'"
        )


def _utf8(name: str, value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError as exc:
        # Lone surrogates come out of JSON escapes; neither SQLite nor a tokenizer takes them.
        raise DocumentError(f"the {name} is not valid Unicode: {exc.reason}") from exc


def _json_copy(metadata: object) -> dict[str, Any] | None:
    if metadata is None:
        return None
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise DocumentError("metadata must be a dict with string keys")
    try:
        dumped = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
        dumped.encode()
        copied: dict[str, Any] = json.loads(dumped)
    except (TypeError, ValueError, RecursionError) as exc:
        raise DocumentError(f"metadata must hold JSON values only: {exc}") from exc
    return copied
