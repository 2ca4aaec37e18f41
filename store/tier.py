"""What a tier is: one place that holds encoded blocks.

A tier knows keys, headers and opaque segments. It knows nothing of layers, models, limits, policy
or other tiers. It is synchronous and thread-safe; who wants concurrency brings threads.

Three different things are told apart: a miss is `None`, damage is `BlockFormatError`, an outage is
`TierError`. Every method may raise the last, and all do after `close()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from .errors import BlockFormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .block import Block
    from .header import BlockHeader
    from .keys import BlockKey

__all__ = ["Arrived", "StoredBlock", "Tier", "check_key", "segment_range", "split_segments"]

#: Told of segments of a block, from the header's so-and-so-many-th on, when they are there.
Arrived = Callable[["BlockHeader", int, "Sequence[memoryview]"], None]


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block that a tier holds: `key`, and `nbytes` of the whole encoded block.

    `idle_s`: for how many seconds it was not used, as far as the tier remembers.
    """

    key: BlockKey
    nbytes: int
    idle_s: float = field(default=0.0, compare=False)


class Tier(ABC):
    """One place that holds encoded blocks.

    `durable`: they outlive the process, and stay until they are deleted. `in_process`: they are
    memory of this process, so that they end with it, and reading them never waits.
    """

    name: str
    durable: bool
    in_process: bool = False

    @abstractmethod
    def header(self, key: BlockKey) -> BlockHeader | None:
        """The header of the block, checked, or None if it is not here.

        Raises `BlockFormatError` if what is here is no sound header of that key, or the block is
        not as long as its header says.
        """

    @abstractmethod
    def segments(self, key: BlockKey, first: int, last: int) -> list[memoryview] | None:
        """Segments `first` up to, not including, `last`, or None if the block is not here.

        Each is read-only, padded, and of the length its header says, in one contiguous read. They
        are *not* checked against their checksums: the reader does that, for every tier. They stay
        valid, and do not change, whatever happens to the block.

        Raises `ValueError` unless `0 <= first < last`, `BlockFormatError` if the block has no
        `last` segments or is damaged.
        """

    def whole(self, key: BlockKey, arrived: Arrived) -> tuple[BlockHeader, list[memoryview]] | None:
        """The header and all segments, or None if the block is not here.

        By as few reads as the tier can: the default asks for the one and then for the others.
        `arrived` is called with each piece as it comes, in order, to be verified while it lies in
        the processor's cache; what it raises ends the read and passes through. Else as `header` and
        `segments`; where the block is replaced meanwhile, they may be of different versions.
        """
        header = self.header(key)
        segments = None if header is None else self.segments(key, 0, len(header.segments))
        if header is None or segments is None:
            return None
        arrived(header, 0, segments)
        return header, segments

    @abstractmethod
    def put(self, key: BlockKey, block: Block) -> None:
        """Keep the block. Replaces one of the same key atomically; keeps none of the caller's
        memory. Raises `ValueError` if the block is of another key.
        """

    @abstractmethod
    def delete(self, key: BlockKey) -> bool:
        """Remove the block; whether it was here."""

    @abstractmethod
    def contains(self, key: BlockKey) -> bool:
        """Whether something lies under the key. It may be damaged."""

    @abstractmethod
    def keys(self, tag: str | None = None) -> Iterator[BlockKey]:
        """The keys held when the iteration starts, of one namespace tag or of all, in any order."""

    @abstractmethod
    def entries(self) -> list[StoredBlock]:
        """All blocks held, the least recently used first, as far as the tier remembers."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Sum of the sizes of the encoded blocks held."""

    @abstractmethod
    def close(self) -> None:
        """Release what the tier holds. A second call does nothing."""

    def footprint(self, header: BlockHeader) -> int:
        """Size in bytes that the block of that header has here. The default is its `nbytes`.

        Raises `TierFullError` if no such block can be put here, whatever room there is.
        """
        return header.nbytes

    def span(self, key: BlockKey, first: int, last: int) -> memoryview | None:
        """Segments `first` … `last - 1` in one piece, padding included, where they lie.

        For a tier that is memory of this process; None, which the default is, from any other. They
        are read-only, not verified, and do not change, whatever happens to the block. A miss and
        errors as `segments`.
        """
        return None

    def quarantine(self, key: BlockKey) -> None:
        """Take a damaged block out of sight. The default deletes it."""
        self.delete(key)

    def delete_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        """`delete` of each key, in order. If it raises, some may be deleted."""
        return [self.delete(key) for key in keys]

    def touch(self, key: BlockKey) -> None:  # noqa: B027 - a default, not a forgotten body
        """Note that the block was used, for `entries` of a later start. Best effort, never raises.

        The default does nothing.
        """

    def cached_share(self, header: BlockHeader) -> float | None:
        """The share of a block that a read finds in memory though the tier is slower than that.

        From 0 to 1; None, which the default is, if there is no such thing or it cannot be told. A
        cheap estimate for forecasts, in tens of us: it reads nothing and never raises. `header`:
        the block's.
        """
        return None

    def idle_s(self, key: BlockKey) -> float | None:
        """For how many seconds no process used the block, as far as the tier remembers.

        None, which the default is, if it does not, or there is no block.
        """
        return None

    def headers(self, keys: Sequence[BlockKey]) -> list[BlockHeader | BlockFormatError | None]:
        """`header` of each key, in order; damage stands in its place instead of being raised."""
        found: list[BlockHeader | BlockFormatError | None] = []
        for key in keys:
            try:
                found.append(self.header(key))
            except BlockFormatError as exc:
                found.append(exc)
        return found

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        """`contains` of each key, in order."""
        return [self.contains(key) for key in keys]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def segment_range(header: BlockHeader, first: int, last: int) -> tuple[int, int]:
    """Offsets in bytes where segments `first` … `last - 1` start and end, padding included.

    Raises as `Tier.segments` does.
    """
    if not 0 <= first < last:
        raise ValueError(f"a range of segments needs 0 <= first < last, got {first} and {last}")
    if last > len(header.segments):
        raise BlockFormatError(f"the block has {len(header.segments)} segments, not {last}")
    return header.segments[first].offset, header.segments[last - 1].end


def split_segments(
    header: BlockHeader, first: int, last: int, data: memoryview
) -> list[memoryview]:
    """`data`, the bytes of `segment_range`, as one read-only view a segment."""
    offsets = [part.offset for part in header.segments[first:last]]
    start, data = offsets[0], data.toreadonly()
    # Nothing lies between segments: each ends where the next one starts.
    ends = [*offsets[1:], start + len(data)]
    return [data[offset - start : end - start] for offset, end in zip(offsets, ends, strict=True)]


def check_key(key: BlockKey, block: Block) -> None:
    """Raise `ValueError` if the block is of another key."""
    if block.header.key != key:
        raise ValueError(f"the block is {block.header.key}, it cannot be put as {key}")
