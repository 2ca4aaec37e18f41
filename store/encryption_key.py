"""The key that stored KV is encrypted with: its text form, and which one a home was made with."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from .errors import EncryptionKeyError
from .files import create_once, read_start

__all__ = ["agree_on_key", "key_from_text", "read_key_file", "read_key_id"]

_TEXT = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_MOST_TEXT_NBYTES = 66  # and a line's end, of any system
_ID_NBYTES = 33

_log = logging.getLogger(__name__)


def key_from_text(text: str) -> bytes:
    """The 32 bytes of 64 hexadecimal digits. Raises `EncryptionKeyError`, which shows none."""
    if _TEXT.fullmatch(text) is None:
        raise EncryptionKeyError(
            f"an encryption key is 64 hexadecimal digits, got {len(text)} characters"
            + (" of other kinds" if len(text) == 64 else "")
        )
    return bytes.fromhex(text)


def read_key_file(path: Path) -> bytes:
    """The key in the file: 64 hexadecimal digits and perhaps a line's end.

    Raises `EncryptionKeyError` for any other content, and when the file cannot be read.
    """
    try:
        data, private = read_start(path, _MOST_TEXT_NBYTES + 1)
    except OSError as exc:
        raise EncryptionKeyError(
            f"the encryption key {path} cannot be read: {exc.strerror or exc}"
        ) from exc
    try:
        key = key_from_text(data.decode("ascii", errors="replace").rstrip("\r\n"))
    except EncryptionKeyError as exc:
        raise EncryptionKeyError(f"the file {path} holds no key: {exc}") from None
    if not private:
        _log.warning("the encryption key %s is open to other users; chmod 600 it", path)
    return key


def agree_on_key(path: Path, key_id: str) -> None:
    """Check the id of the key in use, "" for none, against the one that the home was made with.

    `path` keeps the first one given. Raises `EncryptionKeyError` for another one or none, and when
    the file can be neither read nor made.
    """
    try:
        found = read_key_id(path)
        if found is None and key_id:
            create_once(path, key_id.encode() + b"\n")
            found = read_key_id(path)
    except OSError as exc:
        raise EncryptionKeyError(
            f"{path}, the id of the home's encryption key, can be neither read nor made: "
            f"{exc.strerror or exc}"
        ) from exc
    if found is None or found == key_id:
        return
    given = f"the one given is {key_id}" if key_id else "none is given"
    raise EncryptionKeyError(
        f"this home's KV is encrypted with the key of id {found[:64]!r}, and {given}. Give that "
        f"key; or delete {path}, and what is stored so far is not used any more"
    )


def read_key_id(path: Path) -> str | None:
    """The id of the key that a home is encrypted with; None if it is not. Raises `OSError`."""
    try:
        data, _ = read_start(path, _ID_NBYTES + 1)
    except FileNotFoundError:
        return None
    return data.decode("ascii", errors="replace").rstrip("\n")
