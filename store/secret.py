"""The secret behind all keys of a home: 32 random bytes in one file.

Losing it makes every stored block unreachable, changing it makes every block a miss. So the program
never replaces it: a file that is not what it should be is an error that says what to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from pathlib import Path

from .errors import SecretError
from .files import make_folders, sync_folder, write_all

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
            _create(path)
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
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        mode = os.fstat(descriptor).st_mode
        data = os.read(descriptor, SECRET_NBYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) != SECRET_NBYTES:
        size = f"{len(data)} bytes" if len(data) < SECRET_NBYTES else "more"
        raise SecretError(
            f"the key secret {path} must hold exactly {SECRET_NBYTES} bytes and holds {size}. "
            "Restore it from a backup; or, if the stored blocks may be lost, delete it and the "
            "blocks, and a new one is made."
        )
    if mode & 0o077:
        _log.warning("the key secret %s is open to other users; chmod 600 it", path)
    return data


def _create(path: Path) -> None:
    folder = path.parent
    make_folders(folder)
    temporary = folder / f".{path.name}.{secrets.token_hex(8)}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            write_all(descriptor, [memoryview(secrets.token_bytes(SECRET_NBYTES))])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # A link, not a rename: it fails if another process was first, and that one's secret holds.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # Also by the one that came second: it must not build on a name that may still be lost.
    sync_folder(folder)
