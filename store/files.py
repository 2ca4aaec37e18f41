"""File operations that, synced, survive a power loss."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["make_folders", "sync_folder", "write_all"]


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable. Raises `OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path, *, sync: bool = True) -> None:
    """Make `folder` and its missing parents, with `sync` each durable in its own parent.

    Those made are for us alone, whatever the umask. Raises `OSError`.
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


def write_all(descriptor: int, buffers: list[memoryview]) -> None:
    """Write every byte of the buffers, in order. Raises `OSError`."""
    pending = [view for view in buffers if len(view)]
    while pending:
        written = os.writev(descriptor, pending[:512])  # IOV_MAX is 1024 on Linux, less elsewhere
        while pending and written >= len(pending[0]):
            written -= len(pending.pop(0))
        if written:
            pending[0] = pending[0][written:]
