"""Going over all blocks of a tier: reading each anew, and copying them to another tier.

Each works block by block and yields what it did, so that a caller can count, tell and stop. Others
may use the tiers meanwhile, also from other processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .block import Block, encode_header, verify_segments
from .errors import BlockFormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .keys import BlockKey
    from .tier import Tier

__all__ = ["Copied", "Finding", "copy_blocks", "read_block", "read_settled", "verify_blocks"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One block that was read: its size, and in a sentence what is wrong with it, or None."""

    key: BlockKey
    nbytes: int
    damage: str | None


@dataclass(frozen=True, slots=True)
class Copied:
    """One block that was to be copied. `present`: the target had it, and it was not written again.

    `left_out`: the source's copy is sound, and there is no place for it in the target. `why`: in a
    sentence, what is damaged, or why it was left out. `nbytes`: in the target.
    """

    key: BlockKey
    nbytes: int
    outcome: Literal["copied", "present", "damaged", "left_out"]
    why: str | None = None


def read_block(tier: Tier, key: BlockKey) -> Block | None:
    """The whole block, every byte verified, or None. Raises `BlockFormatError` and `TierError`."""
    found = tier.whole(key, verify_segments)
    if found is None:
        return None
    header, segments = found
    return Block(header, encode_header(header), tuple(segments))


def verify_blocks(tier: Tier, keys: Iterable[BlockKey], *, repair: bool) -> Iterator[Finding]:
    """Read each block; what is damaged is quarantined if `repair` says so.

    A block that is gone meanwhile is left out. Raises `TierError`.
    """
    for key in keys:
        try:
            block = read_settled(tier, key)
        except BlockFormatError as exc:
            if repair:
                tier.quarantine(key)
            yield Finding(key, 0, str(exc))
        else:
            if block is not None:
                yield Finding(key, block.nbytes, None)


def copy_blocks(source: Tier, target: Tier, keys: Iterable[BlockKey]) -> Iterator[Copied]:
    """Copy what the target does not have yet, so that a copy that was cut short is taken up again.

    A block that the target has is compared by its header, which holds the checksums of all that is
    behind it. A block that is gone meanwhile is left out. Raises `TierError`.
    """
    for key in keys:
        try:
            header = source.header(key)
            if header is None:
                continue
            if _has(target, key, header):
                yield Copied(key, header.nbytes, "present")
                continue
            block = read_settled(source, key)
        except BlockFormatError as exc:
            yield Copied(key, 0, "damaged", str(exc))
            continue
        if block is not None:
            target.put(key, block)
            yield Copied(key, block.nbytes, "copied")


def _has(tier: Tier, key: BlockKey, header: object) -> bool:
    try:
        return tier.header(key) == header
    except BlockFormatError:
        return False


def read_settled(tier: Tier, key: BlockKey) -> Block | None:
    """As `read_block`, and once more if it is damaged: it may have been replaced while it was read.

    Raises `BlockFormatError` for what is damaged both times, and `TierError`.
    """
    try:
        return read_block(tier, key)
    except BlockFormatError:
        return read_block(tier, key)
