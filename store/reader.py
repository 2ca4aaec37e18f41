"""A handle on an open block."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from .errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .header import BlockHeader
    from .loading import Loading

__all__ = ["BlockReader"]


class BlockReader:
    """Reads a block. Close it: until then the block is pinned where it is read from.

    A handle may be used by several threads; `close` may be called twice.
    """

    def __init__(self, loading: Loading, closed: Callable[[], None]) -> None:
        self._loading = loading
        self._closed = closed
        self._lock = threading.Lock()
        self._open = True

    @property
    def header(self) -> BlockHeader:
        """The header, verified against what was expected at `open`."""
        return self._loading.header

    @property
    def tier(self) -> str:
        """Name of the tier it is read from; empty when none has it any more."""
        return self._loading.tier

    def read(self, first: int, last: int) -> list[memoryview]:
        """Segments `first` up to, not including, `last`: read-only, padded, verified.

        What is not held yet is one contiguous read from the tier. The views may be kept longer than
        the handle. When the last missing segment of a block has come from a slower tier, the block
        is admitted to the faster ones before this returns.

        Raises `ValueError` for a range that the block does not have, `DamagedBlockError` if no tier
        has a sound copy of the rest, `StoreError` after `close`.
        """
        with self._lock:
            if not self._open:
                raise StoreError("the reader is closed")
        return self._loading.read(first, last)

    def close(self) -> None:
        """Release the pin. Views handed out stay valid. A second call does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        self._closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
