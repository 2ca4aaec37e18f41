"""Where the disk tier's files lie, and which file names are blocks.

    root/blocks/<tag>/<digest[:2]>/<digest>.kv      one block
    root/blocks/<tag>/<digest[:2]>/.<digest>.….tmp  one being written
    root/quarantine/                                damaged blocks, a few, to look at

Other names are left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InvalidKeyError
from .files import open_new
from .keys import BlockKey

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Layout", "open_temporary", "remove_if_abandoned"]


class Layout:
    """Paths under one root. Touches the disk only to list it."""

    def __init__(self, root: Path) -> None:
        self.blocks = root / "blocks"
        self._blocks = str(self.blocks)
        self.quarantine = root / "quarantine"

    def name(self, key: BlockKey) -> str:
        """The path as text: a `Path` takes longer to make than its file to open."""
        return f"{self._blocks}/{key.tag}/{key.digest[:2]}/{key.digest}.kv"

    def path(self, key: BlockKey) -> Path:
        return Path(self.name(key))

    def walk(self, tag: str | None = None) -> Iterator[tuple[BlockKey | None, os.DirEntry[str]]]:
        """Every regular file in a block folder: with its key, or None for any other file.

        Raises `OSError`; folders that vanish meanwhile are skipped.
        """
        for tag_folder in _folders(self.blocks):
            if tag is not None and tag_folder.name != tag:
                continue
            for folder in _folders(tag_folder.path):
                for entry in _scan(folder.path):
                    if entry.is_file(follow_symlinks=False):
                        yield _key_of(tag_folder.name, folder.name, entry.name), entry


def open_temporary(path: Path) -> tuple[int, Path]:
    """A new, locked file to write next to `path`: descriptor and name. Raises `OSError`.

    The lock, held until the descriptor closes or the process dies, tells a file being written from
    one that a crash left behind.
    """
    while True:
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp")
        descriptor = open_new(temporary)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # another process took it for abandoned before it was locked


def remove_if_abandoned(entry: os.DirEntry[str]) -> bool:
    """Remove a temporary file that no living process writes; whether it was.

    One that cannot be removed costs its space alone, so it is left for another time.
    """
    if not (entry.name.startswith(".") and entry.name.endswith(".tmp")):
        return False
    with contextlib.suppress(OSError):
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is written
            os.unlink(entry.path)
            return True
        finally:
            os.close(descriptor)
    return False


def _key_of(tag: str, folder: str, name: str) -> BlockKey | None:
    if not name.endswith(".kv") or not name.startswith(folder):
        return None
    try:
        return BlockKey(tag, name.removesuffix(".kv"))
    except InvalidKeyError:
        return None


def _folders(path: Path | str) -> list[os.DirEntry[str]]:
    return [entry for entry in _scan(path) if entry.is_dir(follow_symlinks=False)]


def _scan(path: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
