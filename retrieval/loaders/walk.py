"""Walking folders in sorted order, following links, without recursion and without loops."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path


def walk(
    root: Path, seen_folders: set[tuple[int, int]]
) -> Iterator[tuple[Path, OSError | ValueError | None]]:
    """Yield `(path, None)` for every file of `root`, `(path, error)` for what cannot be looked at.

    `root` itself may be a file. Entries whose name starts with a dot are left out. A folder whose
    (device, inode) is in `seen_folders` is not entered again: that ends loops of links, and lets
    several roots share one set.
    """
    pending = [root]  # a stack, so that depth costs memory and not Python frames
    while pending:
        path = pending.pop()
        try:
            status = os.stat(path)
            if not stat.S_ISDIR(status.st_mode):
                yield path, None
                continue
            identity = (status.st_dev, status.st_ino)
            if identity in seen_folders:
                continue
            seen_folders.add(identity)
            names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        except (OSError, ValueError) as exc:
            yield path, exc
            continue
        pending.extend(path / name for name in reversed(names))
