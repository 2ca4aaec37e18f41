"""A block that lies in the memory of this process, for who uses its segments where they lie.

Reading memory is computing: it needs no thread and no copy, but each segment is verified here
before it is used, like one from any other tier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .block import verify_segment

if TYPE_CHECKING:
    from collections.abc import Callable

    from .header import BlockHeader

__all__ = ["Resident"]


class Resident:
    """A block's segments in memory. Not thread-safe. `close` it when nothing more is verified.

    `data` holds all of them, unverified: `verify` a segment each time before it is used.
    `tier`: name of the tier that holds them.
    """

    def __init__(
        self, header: BlockHeader, tier: str, data: memoryview, closed: Callable[[int], None]
    ) -> None:
        """`closed` is told once how many bytes were verified."""
        self.header, self.tier, self.data = header, tier, data
        self._closed, self._nbytes, self._open = closed, 0, True

    def segment(self, index: int) -> memoryview:
        """One segment, padding included, as it lies there: not verified."""
        start, size = self.place(index)
        return self.data[start : start + size]

    def place(self, index: int) -> tuple[int, int]:
        """Where in `data` a segment begins, and its bytes, padding included."""
        segment = self.header.segments[index]
        return segment.offset - self.header.header_nbytes, segment.padded_nbytes

    def verify(self, index: int) -> int:
        """Check one segment; its bytes, padding included. Raises `BlockFormatError`."""
        verify_segment(self.header, index, self.segment(index))
        return self.count(index)

    def count(self, index: int) -> int:
        """Note that a segment was verified; its bytes. For who verifies by other means."""
        nbytes = self.header.segments[index].padded_nbytes
        self._nbytes += nbytes
        return nbytes

    def close(self) -> None:
        """Count what was read. A second call does nothing."""
        if self._open:
            self._open = False
            self._closed(self._nbytes)
