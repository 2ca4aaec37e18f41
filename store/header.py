"""What a block says about itself, and the rules between its parts.

Knows nothing of bytes on a disk (block.py) nor of what the segments mean (codecs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from .errors import BlockFormatError
from .keys import KINDS, BlockKey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ALIGNMENT", "BlockHeader", "ExtraValue", "SegmentInfo", "padded"]

ALIGNMENT = 4096

ExtraValue = str | int | float | bytes
Shape = tuple[int, int, int, int]

_MAX_TEXT = 256
_MAX_DIMENSION = 2**31 - 1
_MAX_SEGMENT_NBYTES = 2**40
_MAX_OFFSET = 2**62
_MAX_CHECKSUM = 2**64 - 1
_MAX_EXTRA = 64


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to the next multiple of 4,096."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class SegmentInfo(NamedTuple):
    """Place of one segment: `offset` in the block, `length` without padding, both in bytes.

    `checksum` is the xxh3-64 of the padded segment.
    """

    offset: int
    length: int
    checksum: int

    @property
    def padded_nbytes(self) -> int:
        return -(-self.length // ALIGNMENT) * ALIGNMENT  # `padded`, but this is asked most

    @property
    def end(self) -> int:
        """Offset just behind the padding."""
        return self.offset + self.padded_nbytes


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """A block without its segments. Raises `BlockFormatError` if its parts do not fit together.

    `k_shape`, `v_shape`: (layers, kv_heads, tokens, head_dim); one segment a layer. `dtype` is the
    compute dtype's name, `codec_digest` the digest of the codec's parameters (may be empty).
    `extra`: at most 64 further entries; readers ignore the names they do not know.
    """

    key: BlockKey
    kind: str
    fingerprint: str
    token_ids: tuple[int, ...]
    k_shape: Shape
    v_shape: Shape
    dtype: str
    codec: str
    codec_version: int
    codec_digest: str
    segments: tuple[SegmentInfo, ...]
    extra: Mapping[str, ExtraValue] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BlockFormatError(
                f"kind must be one of {', '.join(KINDS)}, got {self.kind!r:.100}"
            )
        _check_text("fingerprint", self.fingerprint)
        _check_text("dtype", self.dtype)
        _check_text("codec", self.codec)
        _check_text("codec digest", self.codec_digest, allow_empty=True)
        _check_int("codec version", self.codec_version, 0, 2**32 - 1)
        _check_shape("k_shape", self.k_shape)
        _check_shape("v_shape", self.v_shape)
        _check_segments(self.segments)
        layers = len(self.segments)
        if self.k_shape[0] != layers or self.v_shape[0] != layers:
            raise BlockFormatError(
                f"a block has one segment a layer: {layers} segments do not fit "
                f"k_shape {self.k_shape} and v_shape {self.v_shape}"
            )
        tokens = len(self.token_ids)
        if self.kind == "chunk" and not self.k_shape[2] == self.v_shape[2] == tokens:
            raise BlockFormatError(
                f"a chunk has K and V of each of its tokens: {tokens} token ids do not fit "
                f"k_shape {self.k_shape} and v_shape {self.v_shape}"
            )
        _check_extra(self.extra)
        object.__setattr__(self, "extra", MappingProxyType(dict(self.extra)))

    @property
    def header_nbytes(self) -> int:
        """Size of the encoded header, padding included: where the first segment starts."""
        return self.segments[0].offset

    @property
    def nbytes(self) -> int:
        """Size of the whole encoded block."""
        return self.segments[-1].end


def _check_text(what: str, value: object, *, allow_empty: bool = False) -> None:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or not (value or allow_empty):
        raise BlockFormatError(
            f"{what} must be a text of at most {_MAX_TEXT} characters, got {value!r:.100}"
        )


def _check_int(what: str, value: object, low: int, high: int) -> None:
    # `type`, not isinstance: True is no number here, and a numpy integer would not be packed.
    if type(value) is not int or not low <= value <= high:
        raise BlockFormatError(
            f"{what} must be a whole number from {low} to {high}, got {value!r:.100}"
        )


def _check_shape(what: str, shape: object) -> None:
    if not isinstance(shape, tuple) or len(shape) != 4:
        raise BlockFormatError(
            f"{what} must be (layers, kv_heads, tokens, head_dim), got {shape!r:.100}"
        )
    for size in shape:
        _check_int(f"each size of {what}", size, 0, _MAX_DIMENSION)


def _check_segments(segments: object) -> None:
    if not isinstance(segments, tuple) or not segments:
        raise BlockFormatError("a block has at least one segment")
    # All at once: one after the other they would be half of what decoding a header takes.
    if not _are_sound(segments):
        _check_each(segments)


def _are_sound(segments: Sequence[SegmentInfo]) -> bool:
    """Whether `_check_each` finds nothing."""
    offsets, lengths, checksums = zip(*segments, strict=True)
    if {*map(type, chain(offsets, lengths, checksums))} != {int}:
        return False
    ends = [offset - -length // ALIGNMENT * ALIGNMENT for offset, length, _ in segments]
    return (
        ALIGNMENT <= min(offsets) <= max(offsets) <= _MAX_OFFSET
        and 1 <= min(lengths) <= max(lengths) <= _MAX_SEGMENT_NBYTES
        and 0 <= min(checksums) <= max(checksums) <= _MAX_CHECKSUM
        and not offsets[0] % ALIGNMENT
        and ends[:-1] == [*offsets[1:]]
    )


def _check_each(segments: Sequence[SegmentInfo]) -> None:
    end = None
    for index, segment in enumerate(segments):
        _check_int(f"the offset of segment {index}", segment.offset, ALIGNMENT, _MAX_OFFSET)
        _check_int(f"the length of segment {index}", segment.length, 1, _MAX_SEGMENT_NBYTES)
        _check_int(f"the checksum of segment {index}", segment.checksum, 0, _MAX_CHECKSUM)
        if segment.offset % ALIGNMENT or end not in (None, segment.offset):
            raise BlockFormatError(
                f"segments follow one another at multiples of {ALIGNMENT}: "
                f"segment {index} cannot start at {segment.offset}"
            )
        end = segment.end


def _check_extra(extra: Mapping[str, ExtraValue]) -> None:
    if len(extra) > _MAX_EXTRA:
        raise BlockFormatError(f"extra holds at most {_MAX_EXTRA} entries, got {len(extra)}")
    for name, value in extra.items():
        _check_text("a name in extra", name)
        if type(value) is int:
            _check_int(f"extra {name!r}", value, -(2**63), 2**64 - 1)
        elif type(value) not in (str, float, bytes):
            raise BlockFormatError(
                f"extra {name!r} must be a str, int, float or bytes, got {type(value).__name__}"
            )
