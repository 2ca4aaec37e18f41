"""Blocks in the memory of this process."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .block import BlockHeader, decode_header
from .buffers import BufferPool
from .errors import BlockFormatError, TierError
from .header_bytes import check_header
from .tier import StoredBlock, Tier, check_key, segment_range, split_segments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .block import Block
    from .keys import BlockKey

__all__ = ["RamTier"]

#: Memory of evicted blocks kept for the next ones.
_KEPT_NBYTES = 2**25


@dataclass(frozen=True, slots=True)
class _Held:
    data: memoryview  # the whole encoded block, read-only
    header: BlockHeader | None = None  # what the bytes say, while their checksum holds


class RamTier(Tier):
    """Blocks in memory. Segments it returns alias its copy, which is never written again.

    `allocate` gives writable memory of so many bytes that starts at a multiple of 4,096: pinned,
    where a GPU copies from it. By default that of blocks evicted before is used again.
    """

    durable = False
    in_process = True

    def __init__(
        self, name: str = "ram", *, allocate: Callable[[int], memoryview] | None = None
    ) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._held: dict[BlockKey, _Held] = {}
        self._buffers = BufferPool(_KEPT_NBYTES)
        self._allocate = allocate or self._buffers.take
        self._nbytes = 0
        self._closed = False

    def header(self, key: BlockKey) -> BlockHeader | None:
        held = self._find(key)
        if held is None or held.header is None:
            return None if held is None else self._decode(key, held)
        # As sound as decoding them anew, at a hundredth of the time.
        check_header(held.data)
        return held.header

    def segments(self, key: BlockKey, first: int, last: int) -> list[memoryview] | None:
        held = self._find(key)
        if held is None:
            return None
        header = held.header or self._decode(key, held)
        start, end = segment_range(header, first, last)
        return split_segments(header, first, last, held.data[start:end])

    def span(self, key: BlockKey, first: int, last: int) -> memoryview | None:
        """See `Tier`."""
        held = self._find(key)
        if held is None:
            return None
        start, end = segment_range(held.header or self._decode(key, held), first, last)
        return held.data[start:end]

    def put(self, key: BlockKey, block: Block) -> None:
        check_key(key, block)
        data = self._allocate(block.nbytes)
        position = 0
        for part in (memoryview(block.header_bytes), *block.segments):
            data[position : position + len(part)] = part
            position += len(part)
        with self._lock:
            self._check_open_locked()
            self._remove_locked(key)
            self._held[key] = _Held(data.toreadonly(), block.header)
            self._nbytes += block.nbytes

    def delete(self, key: BlockKey) -> bool:
        with self._lock:
            self._check_open_locked()
            return self._remove_locked(key)

    def contains(self, key: BlockKey) -> bool:
        return self._find(key) is not None

    def keys(self, tag: str | None = None) -> Iterator[BlockKey]:
        return iter([entry.key for entry in self.entries() if tag in (None, entry.key.tag)])

    def entries(self) -> list[StoredBlock]:
        with self._lock:
            self._check_open_locked()
            return [StoredBlock(key, len(held.data)) for key, held in self._held.items()]

    @property
    def nbytes(self) -> int:
        with self._lock:
            self._check_open_locked()
            return self._nbytes

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._held.clear()
            self._nbytes = 0
        self._buffers.clear()

    def _find(self, key: BlockKey) -> _Held | None:
        with self._lock:
            self._check_open_locked()
            return self._held.get(key)

    def _decode(self, key: BlockKey, held: _Held) -> BlockHeader:
        header = decode_header(held.data, expect_key=key)
        if header.nbytes != len(held.data):
            raise BlockFormatError(f"the block takes {header.nbytes} bytes, not {len(held.data)}")
        return header

    def _remove_locked(self, key: BlockKey) -> bool:
        held = self._held.pop(key, None)
        if held is None:
            return False
        self._nbytes -= len(held.data)
        return True

    def _check_open_locked(self) -> None:
        if self._closed:
            raise TierError(self.name, "it is closed")
