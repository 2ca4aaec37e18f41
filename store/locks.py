"""One lock a key, made when it is needed."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .keys import BlockKey

__all__ = ["KeyLocks"]


class KeyLocks:
    """Lets one thread at a time write a key; other keys go on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table: dict[BlockKey, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def held(self, key: BlockKey) -> Iterator[None]:
        """Hold the lock of one key. Who holds one must not ask for another."""
        with self._lock:
            lock, users = self._table.get(key) or (threading.Lock(), 0)
            self._table[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._table.pop(key)
                if users > 1:
                    self._table[key] = (lock, users - 1)

    @contextlib.contextmanager
    def all_held(self, keys: Iterable[BlockKey]) -> Iterator[None]:
        """Hold the locks of many keys, taken in one order by everybody."""
        with contextlib.ExitStack() as stack:
            for key in sorted(set(keys)):
                stack.enter_context(self.held(key))
            yield
