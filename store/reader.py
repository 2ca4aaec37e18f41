"""A handle on an open block."""

from __future__ import annotations

import threading
from functools import cached_property, partial
from typing import TYPE_CHECKING, Self

from .errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .header import BlockHeader
    from .loading import Fetched, Loading
    from .resident import Resident

__all__ = ["BlockReader"]


class BlockReader:
    """Reads a block. Close it: until then the block is pinned where it is read from.

    A handle may be used by several threads; `close` may be called twice, and waits for no read: the
    last one that is under way releases the pin.
    """

    def __init__(self, loading: Loading, closed: Callable[[], None]) -> None:
        self._loading = loading
        self._closed = closed
        self._lock = threading.Lock()
        self._open = True
        self._uses = 1  # the handle itself, and every read under way

    @property
    def header(self) -> BlockHeader:
        """The header, verified against what was expected at `open`."""
        return self._loading.header

    @property
    def tier(self) -> str:
        """Name of the tier it is read from; empty when none has it any more."""
        return self._loading.tier

    @property
    def in_memory(self) -> bool:
        """Whether that tier is memory of this process: reading it computes and does not wait."""
        return self._loading.in_memory

    @cached_property
    def cached_share(self) -> float | None:
        """See `Tier.cached_share`. As it was when it was asked first: reading makes it higher."""
        return self._loading.cached_share()

    def resident(self) -> Resident | None:
        """The block where it lies in this process's memory, unverified; None where it does not.

        It may be used as long as the handle is open. Where a segment turns out damaged, `fetch`
        sees to that and finds another copy, if there is one. Raises `StoreError` after `close`.
        """
        with self._lock:
            if not self._open:
                raise StoreError("the reader is closed")
        return self._loading.resident()

    def read(self, first: int, last: int) -> list[memoryview]:
        """Segments `first` up to, not including, `last`: read-only, padded, verified.

        What is not held yet is one contiguous read from the tier. The views may be kept longer than
        the handle. When the last missing segment of a block has come from a slower tier, the block
        is admitted to the faster ones before this returns.

        Raises `ValueError` for a range that the block does not have, `DamagedBlockError` if no tier
        has a sound copy of the rest, `StoreError` after `close`.
        """
        fetched = self.fetch(first, last)
        if fetched.admit is not None:
            fetched.admit()
        return fetched.segments

    def fetch(self, first: int, last: int) -> Fetched:
        """As `read`, for who hands the segments on first: leaves it to the caller to `admit`.

        Where there is something to admit, call it, even after `close`: the pin is held until then.
        """
        with self._lock:
            if not self._open:
                raise StoreError("the reader is closed")
            self._uses += 1
        try:
            fetched = self._loading.fetch(first, last)
        except BaseException:
            self._release()
            raise
        if fetched.admit is None:
            self._release()
            return fetched
        return fetched._replace(admit=partial(self._admit, fetched.admit))

    def close(self) -> None:
        """Release the pin. Views handed out stay valid. A second call does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        self._release()

    def _admit(self, admit: Callable[[], None]) -> None:
        try:
            admit()
        finally:
            self._release()

    def _release(self) -> None:
        with self._lock:
            self._uses -= 1
            unused = not self._uses
        if unused:
            self._closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
