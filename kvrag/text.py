"""What may be encoded as text."""

from __future__ import annotations

from kvrag.errors import InputError

__all__ = ["check_text"]


def check_text(what: str, text: object) -> str:
    """`text`, if it is one that a tokenizer can read.

    Raises:
        InputError: no `str`, or one with half a surrogate pair, which JSON can hold and UTF-8
            cannot.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is {type(text).__name__}, not a text")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InputError(
            f"{what} holds half a surrogate pair ({exc.object[exc.start]!r}) at character "
            f"{exc.start}, which is no character"
        ) from exc
    return text
