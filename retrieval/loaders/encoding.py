"""Bytes into text: UTF-8, what a byte order mark says, and else only what is nearly certain."""

from __future__ import annotations

import codecs

from ..errors import DocumentError, needs_extra

__all__ = ["decode"]

#: Longest first: UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: A guess looks at so many bytes.
_SAMPLE_BYTES = 1 << 17
#: Below this share of known letter pairs no language was recognised, and a guess is a mere guess.
_LEAST_COHERENCE = 0.1


def decode(data: bytes, encoding: str | None = None) -> str:
    """The text of a file. `encoding`: of one that is not UTF-8; None has it guessed.

    Raises:
        DocumentError: binary data, text in several encodings, or in one that nobody can tell.
        MissingExtraError: it would have to be guessed, and charset-normalizer is not installed.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _strict(data, name)
    if b"\0" in data:
        raise DocumentError("binary: it holds NUL bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        where = f"not UTF-8: byte {exc.start} is {data[exc.start]:#04x}"
        start = exc.start
    if encoding is not None:
        return _strict(data, encoding)
    if _mostly_utf8(data):
        raise DocumentError(f"{where}, while most of it is: several encodings in one file")
    with needs_extra("charset-normalizer", "text that is not UTF-8", extra="documents"):
        from charset_normalizer import from_bytes
    begin = max(0, start - _SAMPLE_BYTES // 2)
    guess = from_bytes(data[begin : begin + _SAMPLE_BYTES]).best()
    if guess is None or guess.coherence < _LEAST_COHERENCE:
        perhaps = f" (perhaps {guess.encoding})" if guess is not None else ""
        raise DocumentError(f"{where}, and no other encoding is certain{perhaps}")
    return _strict(data, guess.encoding)


def _strict(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as exc:
        raise DocumentError(f"not {encoding}: byte {exc.start} is {data[exc.start]:#04x}") from exc
    except LookupError as exc:
        raise DocumentError(f"unknown encoding {encoding!r}") from exc


def _mostly_utf8(data: bytes) -> bool:
    """Whether there are more whole characters beyond ASCII than bytes that are part of none."""
    text = data.decode("utf-8", "surrogateescape")
    stray = sum("\udc80" <= char <= "\udcff" for char in text)
    return sum(char > "\x7f" for char in text) - stray > stray
