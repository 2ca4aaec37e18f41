"""What was kept last of a few blocks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from .keys import BlockKey

__all__ = ["Recent"]

V = TypeVar("V")


class Recent(Generic[V]):
    """A value each of at most `most` blocks; the least recently used goes. Thread-safe."""

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._values: OrderedDict[BlockKey, V] = OrderedDict()

    def keep(self, key: BlockKey, value: V) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            if len(self._values) > self._most:
                self._values.popitem(last=False)

    def get(self, key: BlockKey) -> V | None:
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def forget(self, key: BlockKey) -> None:
        with self._lock:
            self._values.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
