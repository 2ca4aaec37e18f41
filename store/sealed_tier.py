"""A tier whose blocks lie sealed in another tier.

It shows plain blocks and stores sealed ones, so that neither the tier below nor the store above
knows of encryption. Meant for tiers whose bytes leave the process: in memory, where the key and
what requests decrypted lie beside them, sealed blocks would cost each hit and protect nothing.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from .errors import BlockFormatError, TierFullError
from .recent import Recent
from .tier import StoredBlock, Tier, check_key, segment_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .block import Block
    from .header import BlockHeader
    from .keys import BlockKey
    from .sealing import Opened, Sealer
    from .tier import Arrived

__all__ = ["SealedTier"]

_ATTEMPTS = 8


class SealedTier(Tier):
    """Shows what lies sealed in `tier`, which it closes. Segments are in memory of their own.

    A block that was sealed with another key, or not at all, is a miss: it is sound, and not ours to
    judge. `contains`, `keys`, `entries` and `nbytes` tell of all that lies in `tier`. What was
    changed since it was sealed is damage, found when it is read.
    """

    def __init__(self, tier: Tier, sealer: Sealer) -> None:
        self.name = tier.name
        self.durable, self.in_process = tier.durable, tier.in_process
        self._tier = tier
        self._sealer = sealer
        self._recent: Recent[Opened] = Recent()

    def header(self, key: BlockKey) -> BlockHeader | None:
        opened = self._open(key)
        return None if opened is None else opened.header

    def headers(self, keys: Sequence[BlockKey]) -> list[BlockHeader | BlockFormatError | None]:
        found: list[BlockHeader | BlockFormatError | None] = []
        for key, sealed in zip(keys, self._tier.headers(keys), strict=True):
            try:
                opened = self._opened(key, sealed)
            except BlockFormatError as exc:
                found.append(exc)
            else:
                found.append(None if opened is None else opened.header)
        return found

    def segments(self, key: BlockKey, first: int, last: int) -> list[memoryview] | None:
        opened = self._recent.get(key)
        if opened is None:
            opened = self._open(key)
        for _ in range(_ATTEMPTS):
            if opened is None:
                return None
            segment_range(opened.header, first, last)
            sealed = self._tier.segments(key, first, last)
            if sealed is None:
                self._recent.forget(key)
                return None
            segments = opened.segments(first, sealed)
            if segments is not None:
                return segments
            # Perhaps they are of a block that was put since that header was read.
            present = self._open(key)
            if present is not None and present.salt == opened.salt:
                raise BlockFormatError(
                    f"what lies as segments {first} to {last - 1} is not what was sealed there"
                )
            opened = present
        raise BlockFormatError("the block is put anew faster than it can be read")

    def whole(self, key: BlockKey, arrived: Arrived) -> tuple[BlockHeader, list[memoryview]] | None:
        """See `Tier`."""
        found = self._tier.whole(key, lambda *_: None)
        opened = self._opened(key, None if found is None else found[0])
        if found is None or opened is None:
            return None
        segments = opened.segments(0, found[1])
        if segments is None:
            # Perhaps the header is of another version than what came with it.
            return super().whole(key, arrived)
        arrived(opened.header, 0, segments)
        return opened.header, segments

    def put(self, key: BlockKey, block: Block) -> None:
        check_key(key, block)
        with self._sealing():
            sealed = self._sealer.seal(block)
        self._tier.put(key, sealed)

    def delete(self, key: BlockKey) -> bool:
        self._recent.forget(key)
        return self._tier.delete(key)

    def delete_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        for key in keys:
            self._recent.forget(key)
        return self._tier.delete_many(keys)

    def contains(self, key: BlockKey) -> bool:
        return self._tier.contains(key)

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        return self._tier.contains_many(keys)

    def keys(self, tag: str | None = None) -> Iterator[BlockKey]:
        return self._tier.keys(tag)

    def entries(self) -> list[StoredBlock]:
        return self._tier.entries()

    @property
    def nbytes(self) -> int:
        return self._tier.nbytes

    def footprint(self, header: BlockHeader) -> int:
        with self._sealing():
            return self._sealer.footprint(header)

    def span(self, key: BlockKey, first: int, last: int) -> None:
        """See `Tier`: what is sealed cannot be used where it lies."""
        return

    def quarantine(self, key: BlockKey) -> None:
        self._recent.forget(key)
        self._tier.quarantine(key)

    def touch(self, key: BlockKey) -> None:
        self._tier.touch(key)

    def cached_share(self, header: BlockHeader) -> float | None:
        return self._tier.cached_share(header)

    def idle_s(self, key: BlockKey) -> float | None:
        return self._tier.idle_s(key)

    def close(self) -> None:
        self._recent.clear()
        self._tier.close()

    @contextlib.contextmanager
    def _sealing(self) -> Iterator[None]:
        try:
            yield
        except BlockFormatError as exc:
            raise TierFullError(self.name, f"the block cannot be sealed: {exc}") from exc

    def _open(self, key: BlockKey) -> Opened | None:
        return self._opened(key, self._tier.header(key))

    def _opened(
        self, key: BlockKey, sealed: BlockHeader | BlockFormatError | None
    ) -> Opened | None:
        self._recent.forget(key)
        if isinstance(sealed, BlockFormatError):
            raise sealed
        opened = None if sealed is None else self._sealer.open(sealed)
        if opened is not None:
            self._recent.keep(key, opened)
        return opened
