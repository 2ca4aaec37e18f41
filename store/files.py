"""Durable file operations: what returns from here survives a power loss."""

from __future__ import annotations

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


def make_folders(folder: Path, mode: int = 0o700) -> None:
    """Make `folder` and its missing parents, each durable in its own parent. Raises `OSError`."""
    missing = []
    place = folder
    while not place.is_dir():
        missing.append(place)
        if place.parent == place:
            break
        place = place.parent
    for place in reversed(missing):
        place.mkdir(mode=mode, exist_ok=True)
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
