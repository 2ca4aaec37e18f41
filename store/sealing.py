"""Sealing: blocks encrypted and authenticated, each in the form of an ordinary block.

AES-256-GCM (NIST SP 800-38D) under keys derived with HKDF-SHA256 (RFC 5869). A sealed block is a
block of version 1 that any tier holds, moves and checks without a key:

    key, kind          those of the block inside
    codec              aes-256-gcm, version 1; the codec's digest is the id of the master key
    token ids, shapes  none: they tell of the text
    segments           the segments inside, encrypted, each of its length; checksums are over these
    extra              salt: 32 random bytes; header: the header inside, encrypted, and its tag;
                       tags: 16 bytes a segment

    master key ─HKDF─► key of the namespace ─HKDF, salt─► key of one sealing
    nonces under the key of one sealing: 0 the header, 1 + i segment i

Every sealing draws its own salt, so no pair of key and nonce is ever used twice, however often a
block is put. A segment is bound to block key, place and number of segments, and by the salt to
this one sealing; the header to block key and the tags of all segments. Tags lie in the header, not
behind their segments: a segment keeps its length, and a range of layers is one contiguous read.

What is not hidden: how many segments of which length, when it was written, whose tag it has.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .block import Block, encode_block, laid_out
from .buffers import aligned_buffer
from .errors import BlockFormatError, EncryptionKeyError
from .header import BlockHeader
from .header_bytes import (
    PREAMBLE_NBYTES,
    decode_header,
    encode_header,
    header_region_nbytes,
    used_nbytes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .keys import BlockKey

__all__ = ["MASTER_KEY_NBYTES", "Opened", "Sealer", "is_sealed"]

MASTER_KEY_NBYTES = 32

_CODEC = "aes-256-gcm"
_VERSION = 1
_HIDDEN = "sealed"
_SALT_NBYTES = 32
_TAG_NBYTES = 16
_NONCE = struct.Struct("<4xQ")
_PLACE = struct.Struct("<QQ")


def is_sealed(header: BlockHeader) -> bool:
    """Whether the block is a sealed one: sound, but of no use without its key."""
    return header.codec == _CODEC


@dataclass(frozen=True, slots=True)
class Opened:
    """The header of a sealed block, decrypted, and what opens its segments."""

    header: BlockHeader
    salt: bytes
    _key: bytes = field(repr=False)
    _tags: bytes = field(repr=False)

    def segments(self, first: int, sealed: Sequence[memoryview]) -> list[memoryview] | None:
        """Padded segments `first` … from their encrypted, padded bytes; in memory of their own.

        None if one of them is not what was sealed there. Nothing decrypted is shown before it is
        authenticated.
        """
        parts = self.header.segments[first : first + len(sealed)]
        if [len(view) for view in sealed] != [part.padded_nbytes for part in parts]:
            return None
        whole = aligned_buffer(sum(map(len, sealed)))
        views, position = [], 0
        for index, (part, view) in enumerate(zip(parts, sealed, strict=True), start=first):
            out = whole[position : position + len(view)]
            place = _place(self.header.key, index, len(self.header.segments))
            tag = self._tags[index * _TAG_NBYTES : (index + 1) * _TAG_NBYTES]
            if not _decrypt(self._key, 1 + index, view[: part.length], tag, place, out):
                return None
            out[part.length :] = bytes(len(out) - part.length)
            views.append(out.toreadonly())
            position += len(view)
        return views


class Sealer:
    """Seals and opens blocks under one master key of 32 bytes. Stateless and thread-safe.

    `key_id`: 32 hexadecimal digits that tell master keys apart and nothing else of them. Raises
    `EncryptionKeyError` for a key of another length, `ImportError` without `cryptography`.
    """

    __slots__ = ("_master", "key_id")

    def __init__(self, master: bytes) -> None:
        if len(master) != MASTER_KEY_NBYTES:
            raise EncryptionKeyError(
                f"an encryption key has {MASTER_KEY_NBYTES} bytes, got {len(master)}"
            )
        self._master = bytes(master)
        self.key_id = _derive(self._master, b"", b"kvrag key id")[:16].hex()

    def __repr__(self) -> str:
        return f"Sealer(key_id={self.key_id!r})"

    def seal(self, block: Block) -> Block:
        """The block, sealed under a salt of its own.

        Raises `BlockFormatError` if the sealed header exceeds 64 KiB, as that of a block near this
        limit does.
        """
        header = block.header
        salt = secrets.token_bytes(_SALT_NBYTES)
        key = self._key(header.key, salt)
        tags, contents = [], []
        for index, (part, view) in enumerate(zip(header.segments, block.segments, strict=True)):
            out = aligned_buffer(part.length)
            place = _place(header.key, index, len(header.segments))
            tags.append(_encrypt(key, 1 + index, view[: part.length], place, out))
            contents.append(out)
        plain = block.header_bytes[: used_nbytes(block.header_bytes)]
        sealed = bytearray(len(plain))
        tag = _encrypt(key, 0, plain, _bound(header.key, b"".join(tags)), sealed)
        outside = self._outside(header, salt=salt, text=bytes(sealed) + tag, tags=b"".join(tags))
        return encode_block(segments=contents, **outside)

    def open(self, sealed: BlockHeader) -> Opened | None:
        """What is inside, or None for a block of another master key, another version, or of none.

        Raises `BlockFormatError` if the block claims to be sealed under this key, and is not.
        """
        if (sealed.codec, sealed.codec_version) != (_CODEC, _VERSION):
            return None
        if sealed.codec_digest != self.key_id:
            return None
        salt, tags, text = (_entry(sealed, name) for name in ("salt", "tags", "header"))
        if len(salt) != _SALT_NBYTES or len(tags) != _TAG_NBYTES * len(sealed.segments):
            raise BlockFormatError("a sealed block has a salt, and a tag a segment")
        key = self._key(sealed.key, salt)
        plain = bytearray(max(0, len(text) - _TAG_NBYTES))
        bound = _bound(sealed.key, tags)
        if not _decrypt(key, 0, text[: len(plain)], text[len(plain) :], bound, plain):
            raise BlockFormatError("the sealed header is not what was sealed under this key")
        region = header_region_nbytes(plain[:PREAMBLE_NBYTES])
        header = decode_header(plain.ljust(region, b"\0"), expect_key=sealed.key)
        if [part.length for part in header.segments] != [part.length for part in sealed.segments]:
            raise BlockFormatError("the segments are not as long as those that were sealed")
        return Opened(header, salt, key, tags)

    def footprint(self, header: BlockHeader) -> int:
        """Size in bytes of the block of that header, sealed. Raises as `seal`."""
        segments = len(header.segments)
        return laid_out(
            [part.length for part in header.segments],
            [2**64 - 1] * segments,
            **self._outside(
                header,
                salt=bytes(_SALT_NBYTES),
                text=bytes(used_nbytes(encode_header(header)) + _TAG_NBYTES),
                tags=bytes(_TAG_NBYTES * segments),
            ),
        ).nbytes

    def _outside(
        self, header: BlockHeader, *, salt: bytes, text: bytes, tags: bytes
    ) -> dict[str, Any]:
        """What the header of the sealed block says, but for its segments."""
        # No tokens, and so no heads and sizes that would tell their number by themselves.
        shape = (len(header.segments), 0, 0, 0)
        return {
            "key": header.key,
            "kind": header.kind,
            "fingerprint": _HIDDEN,
            "token_ids": (),
            "k_shape": shape,
            "v_shape": shape,
            "dtype": _HIDDEN,
            "codec": _CODEC,
            "codec_version": _VERSION,
            "codec_digest": self.key_id,
            "extra": {"salt": salt, "header": text, "tags": tags},
        }

    def _key(self, key: BlockKey, salt: bytes) -> bytes:
        """The key of one sealing: of a namespace's key, which alone opens no other namespace."""
        namespace = _derive(self._master, b"", b"kvrag namespace " + key.tag.encode())
        return _derive(namespace, salt, b"kvrag sealing")


def _derive(secret: bytes, salt: bytes, purpose: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), length=32, salt=salt, info=purpose).derive(secret)


def _place(key: BlockKey, index: int, segments: int) -> bytes:
    return b"kvrag segment " + str(key).encode() + _PLACE.pack(index, segments)


def _bound(key: BlockKey, tags: bytes) -> bytes:
    return b"kvrag header " + str(key).encode() + tags


def _encrypt(
    key: bytes, nonce: int, plain: memoryview | bytes, bound: bytes, out: memoryview | bytearray
) -> bytes:
    """Fill `out`, as long as `plain`; the tag. `bound` is authenticated beside it."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(key), modes.GCM(_NONCE.pack(nonce))).encryptor()
    encryptor.authenticate_additional_data(bound)
    encryptor.update_into(plain, out)
    encryptor.finalize()
    return encryptor.tag


def _decrypt(
    key: bytes,
    nonce: int,
    sealed: memoryview | bytes,
    tag: bytes,
    bound: bytes,
    out: memoryview | bytearray,
) -> bool:
    """Fill the start of `out`; whether all of it is authentic. If not, `out` must not be used."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if len(tag) != _TAG_NBYTES:
        return False
    decryptor = Cipher(algorithms.AES(key), modes.GCM(_NONCE.pack(nonce), tag)).decryptor()
    decryptor.authenticate_additional_data(bound)
    decryptor.update_into(sealed, out)
    try:
        decryptor.finalize()
    except InvalidTag:
        return False
    return True


def _entry(sealed: BlockHeader, name: str) -> bytes:
    value = sealed.extra.get(name)
    if not isinstance(value, bytes):
        raise BlockFormatError(f"a sealed block has {name} in its extra entries, as bytes")
    return value
