"""Damaged blocks put aside to be looked at: the newest few, so that a flood cannot fill the disk.

    folder/<number>.<tag>.<digest>.kv     the number is the time in ns, and grows in any case

Knows nothing of tiers.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from typing import TYPE_CHECKING

from .files import make_folders

if TYPE_CHECKING:
    from pathlib import Path

    from .keys import BlockKey

__all__ = ["Quarantine"]

_FILES = 16
_NBYTES = 64 * 2**20
_NAME = re.compile(r"[0-9]{20}\.[0-9a-f]{32}\.[0-9a-f]{64}\.kv", re.ASCII)


class Quarantine:
    """At most 16 files in `folder`, and at most 64 MiB unless the newest alone is larger.

    All methods raise `OSError`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, path: Path, key: BlockKey) -> None:
        """Move the file in; nothing if it is gone."""
        make_folders(self.folder)
        # Not the time alone: a clock that was set back would make the newest the first to go.
        number = max(time.time_ns(), max((int(name[:20]) for name in self.names()), default=0) + 1)
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, self.folder / f"{number:020d}.{key.tag}.{key.digest}.kv")
        self._trim()

    def names(self) -> list[str]:
        """Of what lies here, the oldest first. Other files are left alone."""
        try:
            return sorted(name for name in os.listdir(self.folder) if _NAME.fullmatch(name))
        except FileNotFoundError:
            return []

    def entries(self) -> dict[str, int]:
        """The size of each in bytes, by name, the oldest first."""
        sizes = {}
        for name in self.names():
            with contextlib.suppress(FileNotFoundError):
                sizes[name] = (self.folder / name).lstat().st_size
        return sizes

    def clear(self) -> None:
        """Delete what lies here."""
        for name in self.names():
            _remove(self.folder / name)

    def _trim(self) -> None:
        nbytes = 0
        for age, (name, size) in enumerate(reversed(self.entries().items())):
            nbytes += size
            if age and (age >= _FILES or nbytes > _NBYTES):
                _remove(self.folder / name)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # what lay in a block's place may be a folder
        shutil.rmtree(path)
