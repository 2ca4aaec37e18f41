"""The secret behind all keys of a home: 32 random bytes in one file.

Losing it makes every stored block unreachable, changing it makes every block a miss. So the program
never replaces it: a file that is not what it should be is an error that says what to do.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from .errors import SecretError
from .files import create_once, read_start

__all__ = ["SECRET_NBYTES", "load_or_create_secret"]

SECRET_NBYTES = 32

_log = logging.getLogger(__name__)


def load_or_create_secret(path: Path | str) -> bytes:
    """The 32 bytes in the file, which is made (mode 0600, durable) if there is none.

    Processes that start at once agree on one secret. Raises `SecretError` for a file that does not
    hold exactly 32 bytes, and when the file can be neither read nor made.
    """
    path = Path(path)
    try:
        found = _read(path)
        if found is None:
            create_once(path, secrets.token_bytes(SECRET_NBYTES))
            found = _read(path)
    except OSError as exc:
        raise SecretError(
            f"the key secret {path} can be neither read nor made: {exc.strerror or exc}"
        ) from exc
    if found is None:
        raise SecretError(f"the key secret {path} was removed while it was being made; try again")
    return found


def _read(path: Path) -> bytes | None:
    try:
        data, private = read_start(path, SECRET_NBYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) != SECRET_NBYTES:
        size = f"{len(data)} bytes" if len(data) < SECRET_NBYTES else "more"
        raise SecretError(
            f"the key secret {path} must hold exactly {SECRET_NBYTES} bytes and holds {size}. "
            "Restore it from a backup; or, if the stored blocks may be lost, delete it and the "
            "blocks, and a new one is made."
        )
    if not private:
        _log.warning("the key secret %s is open to other users; chmod 600 it", path)
    return data
