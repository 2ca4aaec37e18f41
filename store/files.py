"""File operations that, synced, survive a power loss."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "create_once",
    "link_once",
    "make_folders",
    "open_new",
    "read_start",
    "sync_folder",
    "write_all",
]


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path, *, sync: bool = True) -> None:
    """Make `folder` and its missing parents, with `sync` each durable in its own parent.

    Those made are for us alone: mode 0700, whatever the umask. Raises `OSError`.
    """
    missing = []
    place = folder
    while not place.is_dir():
        missing.append(place)
        if place.parent == place:
            break
        place = place.parent
    for place in reversed(missing):
        # Another process may be making it, too, and have come as far as this.
        with contextlib.suppress(FileExistsError):
            place.mkdir(mode=0o700)
            place.chmod(0o700)
        if sync:
            sync_folder(place.parent)


def open_new(path: Path) -> int:
    """A descriptor to write a file that was not there: mode 0600, whatever the umask.

    Raises `OSError`, also where a link lies in its place.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


def create_once(path: Path, data: bytes) -> None:
    """Make the file, whole and durable, unless there is one; so are its folders made.

    Of several processes one comes first, and its file stays. Raises `OSError`.
    """
    folder = path.parent
    make_folders(folder)
    temporary = folder / f".{path.name}.{secrets.token_hex(8)}.tmp"
    descriptor = open_new(temporary)
    try:
        try:
            write_all(descriptor, [memoryview(data)])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _name_once(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link_once(temporary: Path, path: Path) -> None:
    """Give a whole file in the same folder its name, durably, unless there is one of that name.

    The file stays under its old name, too. Raises `OSError`.
    """
    descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _name_once(temporary, path)


def _name_once(temporary: Path, path: Path) -> None:
    # A link, not a rename: it fails if another process was first.
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)
    # Also by the one that came second: it must not build on a name that may still be lost.
    sync_folder(path.parent)


def read_start(path: Path, nbytes: int) -> tuple[bytes, bool]:
    """The first bytes of a file, and whether it is closed to other users. Raises `OSError`."""
    # Not blocking: a pipe laid in the file's place must not hang us.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(descriptor, nbytes), not os.fstat(descriptor).st_mode & 0o077
    finally:
        os.close(descriptor)


def write_all(descriptor: int, buffers: list[memoryview]) -> None:
    """Write every byte of the buffers, in order. Raises `OSError`."""
    pending = [view for view in buffers if len(view)]
    while pending:
        written = os.writev(descriptor, pending[:512])  # IOV_MAX is 1024 on Linux, less elsewhere
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]
