"""The block format, version 1: the same bytes in every tier and on the network.

    0       8   magic, 89 4b 56 52 41 47 0d 0a
    8       4   version, unsigned, little-endian
    12      4   length of the header's msgpack, unsigned, little-endian
    16      8   xxh3-64 of the header region without these 8 bytes, little-endian
    24      …   the header, one msgpack map
    …           zeros to the next multiple of 4,096: end of the header region, at most 64 KiB
    …           segment 0, zeros to the next multiple of 4,096
    …           segment 1, … and nothing behind the last

The header holds offset, length and checksum (xxh3-64, padding included) of every segment, so any
range of segments is one contiguous, aligned range, and one flipped bit anywhere is found. There is
one encoding of a header: a decoded one encodes to the same bytes. Checksums find accidents, not
forgers: who can write into a tier is trusted with its contents, not with our memory, and every
bound and type is checked before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from .errors import BlockFormatError
from .header import ALIGNMENT, BlockHeader, ExtraValue, SegmentInfo
from .header_bytes import (
    MAGIC,
    MAX_HEADER_NBYTES,
    PREAMBLE_NBYTES,
    VERSION,
    decode_header,
    encode_header,
    header_region_nbytes,
    needed_region_nbytes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

    from .keys import BlockKey

__all__ = [
    "ALIGNMENT",
    "MAGIC",
    "MAX_HEADER_NBYTES",
    "PREAMBLE_NBYTES",
    "VERSION",
    "Block",
    "BlockHeader",
    "SegmentInfo",
    "decode_header",
    "encode_block",
    "encode_header",
    "header_region_nbytes",
    "laid_out",
    "verify_segment",
    "verify_segments",
]

_ZEROS = bytes(ALIGNMENT)


@dataclass(frozen=True, slots=True)
class Block:
    """An encoded block: `header`, its bytes, and the padded segments, read-only, in order.

    Segments whose length needs no padding alias the memory given to `encode_block`; a tier copies
    what it keeps.
    """

    header: BlockHeader
    header_bytes: bytes
    segments: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        return self.header.nbytes


def encode_block(
    *,
    key: BlockKey,
    kind: str,
    fingerprint: str,
    token_ids: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    dtype: str,
    codec: str,
    codec_version: int,
    codec_digest: str,
    segments: Sequence[Buffer],
    extra: Mapping[str, ExtraValue] | None = None,
) -> Block:
    """The block of these segments, one a layer: any C-contiguous buffers.

    Raises `BlockFormatError` if the parts do not fit together or the header exceeds 64 KiB.
    """
    contents = [memoryview(segment).cast("B") for segment in segments]
    buffers = tuple(_padded_view(content) for content in contents)
    checksums = [xxhash.xxh3_64_intdigest(buffer) for buffer in buffers]
    header = laid_out(
        list(map(len, contents)),
        checksums,
        key=key,
        kind=kind,
        fingerprint=fingerprint,
        token_ids=tuple(map(int, token_ids)),
        k_shape=_shape(k_shape),
        v_shape=_shape(v_shape),
        dtype=dtype,
        codec=codec,
        codec_version=codec_version,
        codec_digest=codec_digest,
        extra=extra or {},
    )
    return Block(header, encode_header(header), buffers)


def laid_out(lengths: Sequence[int], checksums: Sequence[int], **parts: Any) -> BlockHeader:
    """The header of `parts` with segments of these lengths, in bytes, right behind it.

    Raises as `encode_block`.
    """
    # Offsets depend on the header's size, and that, through msgpack's short integers, on the
    # offsets: start small and grow. It settles at once but for headers at the edge of a page.
    start = ALIGNMENT
    while True:
        places = []
        offset = start
        for length, checksum in zip(lengths, checksums, strict=True):
            places.append(SegmentInfo(offset, length, checksum))
            offset = places[-1].end
        header = BlockHeader(segments=tuple(places), **parts)
        region = needed_region_nbytes(header)
        if region <= start:
            return header
        start = region


def verify_segment(header: BlockHeader, index: int, buffer: Buffer) -> None:
    """Check one padded segment against its header. Raises `BlockFormatError`."""
    verify_segments(header, index, [memoryview(buffer).cast("B")])


def verify_segments(header: BlockHeader, first: int, views: Sequence[memoryview]) -> None:
    """Check padded segments, views of bytes, from the header's `first` on.

    Raises `BlockFormatError`, and `ValueError` if the header has not so many.
    """
    parts = header.segments[first : first + len(views)]
    digest = xxhash.xxh3_64_intdigest
    for index, (part, view) in enumerate(zip(parts, views, strict=True), start=first):
        nbytes = len(view)
        padding = nbytes - part.length
        if nbytes % ALIGNMENT or not 0 <= padding < ALIGNMENT:
            raise BlockFormatError(
                f"segment {index} must be {part.padded_nbytes} bytes, got {nbytes}"
            )
        if digest(view) != part.checksum:
            raise BlockFormatError(f"the checksum of segment {index} does not match")
        # As bytes: two views are compared number by number, a hundred times slower.
        if padding and not _ZEROS.startswith(view[-padding:]):
            raise BlockFormatError(f"the padding of segment {index} is not zero")


def _padded_view(content: memoryview) -> memoryview:
    missing = -len(content) % ALIGNMENT
    if not missing:
        return content.toreadonly()
    return memoryview(b"".join((content, _ZEROS[:missing])))


def _shape(sizes: Sequence[int]) -> tuple[int, int, int, int]:
    if len(sizes) != 4:
        raise BlockFormatError(
            f"a shape must be (layers, kv_heads, tokens, head_dim), got {sizes!r:.100}"
        )
    layers, heads, tokens, dim = map(int, sizes)
    return layers, heads, tokens, dim
