"""One job a corpus: the second waits, and says for whom."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Waiting", "only_job"]

#: Called once, with what the holder of a lock wrote there, before it is waited for.
Waiting = Callable[[str], None]

_ASK_S = 0.2


@contextmanager
def only_job(path: Path, waiting: Waiting) -> Iterator[None]:
    """Hold the lock file at `path`, which is made with its folder; a process that dies drops it.

    Args:
        waiting: called if another has it; what it raises ends the waiting.

    Raises OSError where the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        told = False
        while not _locked(descriptor):
            if not told:
                waiting(os.pread(descriptor, 100, 0).decode("ascii", "replace").strip())
                told = True
            time.sleep(_ASK_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True
