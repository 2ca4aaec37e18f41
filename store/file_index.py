"""What the disk tier remembers of its files. The files are the truth; this is corrected by them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .tier import StoredBlock

if TYPE_CHECKING:
    import os

    from .header import BlockHeader
    from .keys import BlockKey

__all__ = ["FileIndex"]

_CACHED_HEADERS = 256
_TOUCH_GRAIN_S = 3600.0


@dataclass(slots=True)
class _Known:
    nbytes: int
    used_s: float  # modification time of the file: when it was written or, coarsely, used


class FileIndex:
    """Sizes and ages of all files, headers of some. Thread-safe; touches no disk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[BlockKey, _Known] = {}
        self._nbytes = 0
        # Each with the identity of the file it was read from: a replaced file is not found here.
        self._headers: OrderedDict[BlockKey, tuple[tuple[int, ...], BlockHeader]] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Sum of the sizes of the files known."""
        with self._lock:
            return self._nbytes

    def note(self, key: BlockKey, status: os.stat_result) -> None:
        """The file is there."""
        with self._lock:
            known = self._known.get(key)
            self._nbytes += status.st_size - (known.nbytes if known is not None else 0)
            self._known[key] = _Known(status.st_size, status.st_mtime)

    def forget(self, key: BlockKey) -> None:
        """The file is not there."""
        with self._lock:
            known = self._known.pop(key, None)
            self._headers.pop(key, None)
            if known is not None:
                self._nbytes -= known.nbytes

    def entries(self) -> list[StoredBlock]:
        """All files known, the least recently used first."""
        with self._lock:
            by_age = sorted(self._known.items(), key=lambda item: item[1].used_s)
            return [StoredBlock(key, known.nbytes) for key, known in by_age]

    def used(self, key: BlockKey, now_s: float) -> bool:
        """The file was used; whether that is worth noting in the file, at most once an hour."""
        with self._lock:
            known = self._known.get(key)
            if known is None or now_s - known.used_s < _TOUCH_GRAIN_S:
                return False
            known.used_s = now_s
            return True

    def keep_header(self, key: BlockKey, status: os.stat_result, header: BlockHeader) -> None:
        with self._lock:
            self._headers[key] = (_identity(status), header)
            self._headers.move_to_end(key)
            while len(self._headers) > _CACHED_HEADERS:
                self._headers.popitem(last=False)

    def header(self, key: BlockKey, status: os.stat_result) -> BlockHeader | None:
        """The header kept of that very file."""
        with self._lock:
            identity, header = self._headers.get(key, (None, None))
            return header if identity == _identity(status) else None

    def clear(self) -> None:
        with self._lock:
            self._known.clear()
            self._headers.clear()
            self._nbytes = 0


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
