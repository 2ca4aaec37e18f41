"""Claims on blocks among the processes of one machine: who has one is making that block.

A claim is a lock on one byte of one file, so that a process that dies leaves nothing behind: the
system takes the lock back. Two keys that share a byte, of 2**60, wait for one another in vain, and
two stores of one process on one file do not see each other's claims: claims save work, and nothing
may depend on them.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from .keys import BlockKey

__all__ = ["Claims"]

_log = logging.getLogger(__name__)

_HELD = (errno.EACCES, errno.EAGAIN)


class Claims:
    """Claims in the file at `path`, which is made at the first one. Thread-safe.

    Where the file cannot be made or locked, every claim is granted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._closed = False

    def claim(self, key: BlockKey) -> bool:
        """Whether no other process has the key, which is then this one's. Never waits."""
        try:
            with self._lock:
                if self._closed:
                    return True
                if self._descriptor is None:
                    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                    self._descriptor = os.open(self._path, flags, 0o600)
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(key))
        except OSError as exc:
            if exc.errno in _HELD and self._descriptor is not None:
                return False
            _log.debug("blocks are not claimed in %s: %s", self._path, exc)
        return True

    def release(self, key: BlockKey) -> None:
        """Give a claim back; nothing if there is none."""
        with self._lock:
            if self._descriptor is None:
                return
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _place(key))
            except OSError as exc:
                _log.debug("a claim in %s is not given back: %s", self._path, exc)

    def close(self) -> None:
        """Give all claims back. A second call does nothing."""
        with self._lock:
            self._closed = True
            descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _place(key: BlockKey) -> int:
    return int(key.digest[:15], 16)
