"""Decoded headers of a few files, each with the identity of the file that it was read from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .recent import Recent

if TYPE_CHECKING:
    import os

    from .header import BlockHeader
    from .keys import BlockKey

__all__ = ["HeaderCache"]


class _Kept(NamedTuple):
    identity: tuple[int, ...]
    region: bytes
    header: BlockHeader


class HeaderCache:
    """The headers used last. Thread-safe. A file that was replaced is not found here."""

    def __init__(self) -> None:
        self._headers: Recent[_Kept] = Recent()

    def keep(
        self, key: BlockKey, status: os.stat_result, region: bytes, header: BlockHeader
    ) -> None:
        """`region`: the bytes that the header was decoded from."""
        self._headers.keep(key, _Kept(_identity(status), region, header))

    def get(self, key: BlockKey, status: os.stat_result) -> BlockHeader | None:
        """The header kept of that very file."""
        kept = self._headers.get(key)
        return kept.header if kept and kept.identity == _identity(status) else None

    def decoded(self, key: BlockKey, region: bytes) -> BlockHeader | None:
        """The header kept that was decoded from the same bytes."""
        kept = self._headers.get(key)
        return kept.header if kept and kept.region == region else None

    def clear(self) -> None:
        self._headers.clear()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
