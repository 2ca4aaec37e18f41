"""Which keys come a second time: what is used once need not push out what is used again."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .keys import BlockKey

__all__ = ["SecondUse"]


class SecondUse:
    """Remembers the last `most` to `2 * most` different keys. Thread-safe."""

    def __init__(self, most: int = 16_384) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._newer: set[int] = set()
        self._older: set[int] = set()

    def again(self, key: BlockKey, part: int = 0) -> bool:
        """Note a use of the block, or of one part of it; whether the same was seen before."""
        # 60 bits: one key in billions is taken for another, and is admitted a use too early.
        mark = int(key.digest[:15], 16) + part
        with self._lock:
            known = mark in self._newer or mark in self._older
            self._newer.add(mark)
            if len(self._newer) >= self._most:
                self._older, self._newer = self._newer, set()
            return known
