"""The header region of a block: preamble, checksum, msgpack and padding, as block.py draws it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]
import xxhash

from .errors import BlockFormatError, InvalidKeyError
from .header import ALIGNMENT, BlockHeader, SegmentInfo, padded
from .keys import BlockKey

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "MAGIC",
    "MAX_HEADER_NBYTES",
    "PREAMBLE_NBYTES",
    "VERSION",
    "check_header",
    "decode_header",
    "encode_header",
    "header_region_nbytes",
    "needed_region_nbytes",
    "used_nbytes",
]

MAGIC = b"\x89KVRAG\r\n"  # breaks when a transfer treats it as text
VERSION = 1
PREAMBLE_NBYTES = 16
MAX_HEADER_NBYTES = 65536

_PREAMBLE = struct.Struct("<8sII")
_CHECKSUM = struct.Struct("<Q")
_START = PREAMBLE_NBYTES + _CHECKSUM.size
_ZEROS = bytes(ALIGNMENT)
_FIELDS = (
    "key",
    "kind",
    "fingerprint",
    "token_ids",
    "k_shape",
    "v_shape",
    "dtype",
    "codec",
    "codec_version",
    "codec_digest",
    "segments",
    "extra",
)


def needed_region_nbytes(header: BlockHeader) -> int:
    """Size of the region that the header takes, wherever its segments start.

    Raises `BlockFormatError` if that is more than 64 KiB.
    """
    return padded(_START + len(_pack(header)))


def encode_header(header: BlockHeader) -> bytes:
    """The header region. Raises `BlockFormatError` if it does not end where segments start."""
    packed = _pack(header)
    return _header_region(packed, header.header_nbytes)


def header_region_nbytes(buffer: Buffer) -> int:
    """Size of the header region, from (at least) the first 16 bytes of a block.

    Raises `BlockFormatError` for bytes that start no block of this version.
    """
    return padded(used_nbytes(buffer))


def used_nbytes(buffer: Buffer) -> int:
    """Size of the header without its padding, from (at least) the first 16 bytes of a block.

    Raises as `header_region_nbytes`.
    """
    return _START + _packed_nbytes(memoryview(buffer).cast("B"))


def decode_header(buffer: Buffer, *, expect_key: BlockKey | None = None) -> BlockHeader:
    """The header at the start of `buffer`, which may go on behind it.

    Raises `BlockFormatError` for anything but the exact bytes that `encode_block` makes, and for a
    block of another key than `expect_key`.
    """
    view = _checked_region(buffer)
    region, used = len(view), used_nbytes(view)
    packed, padding = view[_START:used].tobytes(), view[used:].tobytes()
    fields = _unpack(packed)
    header = _parse(fields)
    if header.header_nbytes != region:
        raise BlockFormatError(
            f"the first segment starts at {header.header_nbytes}, not behind the header at {region}"
        )
    # The fields are those of a sound header, so these are the bytes that `encode_header` makes.
    if msgpack.packb(fields, use_bin_type=True) != packed or padding != _ZEROS[: len(padding)]:
        raise BlockFormatError("the header is not in the one encoding that a block may have")
    if expect_key is not None and header.key != expect_key:
        raise BlockFormatError(f"the block is {header.key}, expected {expect_key}")
    return header


def check_header(buffer: Buffer) -> None:
    """Check the bytes of a header that was made from them before, or they from it.

    A fraction of `decode_header`'s time. Raises `BlockFormatError` unless they are as they were.
    """
    _checked_region(buffer)


def _checked_region(buffer: Buffer) -> memoryview:
    """The header region at the start of `buffer`. Raises `BlockFormatError` for a changed bit."""
    view = memoryview(buffer).cast("B")
    region = header_region_nbytes(view)
    if len(view) < region:
        raise BlockFormatError(f"the header needs {region} bytes, only {len(view)} are there")
    view = view[:region]
    (checksum,) = _CHECKSUM.unpack_from(view, PREAMBLE_NBYTES)
    if checksum != _header_checksum(view[:PREAMBLE_NBYTES], view[_START:]):
        raise BlockFormatError("the header's checksum does not match")
    return view


def _pack(header: BlockHeader) -> bytes:
    try:
        token_ids = struct.pack(f"<{len(header.token_ids)}I", *header.token_ids)
    except struct.error as exc:
        raise BlockFormatError("token ids must be whole numbers from 0 to 2**32 - 1") from exc
    try:
        packed: bytes = msgpack.packb(
            {
                "key": str(header.key),
                "kind": header.kind,
                "fingerprint": header.fingerprint,
                "token_ids": token_ids,
                "k_shape": header.k_shape,
                "v_shape": header.v_shape,
                "dtype": header.dtype,
                "codec": header.codec,
                "codec_version": header.codec_version,
                "codec_digest": header.codec_digest,
                "segments": header.segments,
                "extra": dict(header.extra),
            },
            use_bin_type=True,
        )
    except UnicodeEncodeError as exc:
        raise BlockFormatError("a text of the header is no valid Unicode") from exc
    if padded(_START + len(packed)) > MAX_HEADER_NBYTES:
        raise BlockFormatError(
            f"the header takes {_START + len(packed)} bytes, at most {MAX_HEADER_NBYTES} may be "
            f"taken: fewer tokens ({len(header.token_ids)}), layers ({len(header.segments)}) "
            "or extra entries"
        )
    return packed


def _header_region(packed: bytes, region: int) -> bytes:
    padding = region - _START - len(packed)
    if not 0 <= padding < ALIGNMENT:
        raise BlockFormatError(f"a header of {len(packed)} bytes does not end at {region}")
    preamble = _PREAMBLE.pack(MAGIC, VERSION, len(packed))
    body = packed + _ZEROS[:padding]
    return preamble + _CHECKSUM.pack(_header_checksum(preamble, body)) + body


def _header_checksum(preamble: Buffer, body: Buffer) -> int:
    state = xxhash.xxh3_64(preamble)
    state.update(body)
    return state.intdigest()


def _packed_nbytes(view: memoryview) -> int:
    if len(view) < PREAMBLE_NBYTES:
        raise BlockFormatError(
            f"a block starts with {PREAMBLE_NBYTES} bytes, only {len(view)} are there"
        )
    magic, version, packed_nbytes = _PREAMBLE.unpack_from(view)
    if magic != MAGIC:
        raise BlockFormatError("the bytes do not start as a block does")
    if version != VERSION:
        raise BlockFormatError(f"the block is of version {version}, this program reads {VERSION}")
    if padded(_START + packed_nbytes) > MAX_HEADER_NBYTES:
        raise BlockFormatError(
            f"a header of {packed_nbytes} bytes is announced, at most {MAX_HEADER_NBYTES} "
            "may be taken"
        )
    return int(packed_nbytes)


def _unpack(packed: bytes) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(packed, raw=False, strict_map_key=True)
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise BlockFormatError(f"the header is no msgpack: {exc}") from exc
    if not isinstance(fields, dict) or tuple(fields) != _FIELDS:
        raise BlockFormatError("the header does not hold the fields of a block, in their order")
    return fields


def _parse(fields: dict[str, Any]) -> BlockHeader:
    packed_ids = fields["token_ids"]
    if not isinstance(packed_ids, bytes) or len(packed_ids) % 4:
        raise BlockFormatError("token ids must be packed in 4 bytes each")
    extra = fields["extra"]
    if not isinstance(extra, dict):
        raise BlockFormatError("extra must be a map")
    try:
        key = BlockKey.parse(fields["key"])
    except InvalidKeyError as exc:
        raise BlockFormatError(f"the header holds no key: {exc}") from exc
    for name in ("k_shape", "v_shape"):
        if not isinstance(fields[name], list) or len(fields[name]) != 4:
            raise BlockFormatError(f"{name} must be (layers, kv_heads, tokens, head_dim)")
    return BlockHeader(
        key=key,
        kind=fields["kind"],
        fingerprint=fields["fingerprint"],
        token_ids=struct.unpack(f"<{len(packed_ids) // 4}I", packed_ids),
        k_shape=(*fields["k_shape"],),
        v_shape=(*fields["v_shape"],),
        dtype=fields["dtype"],
        codec=fields["codec"],
        codec_version=fields["codec_version"],
        codec_digest=fields["codec_digest"],
        segments=_parse_segments(fields["segments"]),
        extra=extra,
    )


def _parse_segments(rows: object) -> tuple[SegmentInfo, ...]:
    if not isinstance(rows, list):
        raise BlockFormatError("segments must be a list")
    if not {*map(type, rows)} <= {list} or not {*map(len, rows)} <= {3}:
        raise BlockFormatError("a segment must be offset, length and checksum")
    return tuple(map(SegmentInfo._make, rows))
