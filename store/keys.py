"""Block keys: what a block is called, and nothing about where it lies.

A key is `tag/digest`. The tag is a keyed hash of the namespace, the digest a keyed hash of all that
decides the block's bytes. Both need the secret: without it no one can tell from a key which text is
behind it, nor make the key of another namespace. Tier, order and neighbours take no part.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgpack  # type: ignore[import-untyped]

from .errors import InvalidKeyError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KINDS", "NO_BLOCK", "BlockKey", "KeyMaker", "packed", "unpacked"]

KINDS = ("chunk", "fragment", "swap", "vectors")

_TAG = re.compile(r"[0-9a-f]{32}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SCHEME = 1  # of what is hashed; a change makes every stored block a miss


@dataclass(frozen=True, slots=True, order=True)
class BlockKey:
    """Name of a block. `tag`: 32, `digest`: 64 lower-case hexadecimal digits, and nothing else.

    So a key is always safe as a file name. Raises `InvalidKeyError`.
    """

    tag: str
    digest: str

    def __post_init__(self) -> None:
        for what, value, pattern, length in (
            ("tag", self.tag, _TAG, 32),
            ("digest", self.digest, _DIGEST, 64),
        ):
            if not isinstance(value, str) or pattern.fullmatch(value) is None:
                raise InvalidKeyError(
                    f"{what} must be {length} lower-case hexadecimal digits, got {value!r:.100}"
                )

    def __str__(self) -> str:
        return f"{self.tag}/{self.digest}"

    @classmethod
    def parse(cls, text: str) -> BlockKey:
        """The key written as `tag/digest`. Raises `InvalidKeyError`."""
        if not isinstance(text, str) or text.count("/") != 1:
            raise InvalidKeyError(f"a key is written tag/digest, got {text!r:.150}")
        return cls(*text.split("/"))


#: The key of no block, for asking whether a tier answers and the like.
NO_BLOCK = BlockKey("0" * 32, "0" * 64)


def packed(key: BlockKey) -> bytes:
    """The key in 48 bytes: a million keys are kept, and as text they take twice the memory."""
    return bytes.fromhex(key.digest + key.tag)


def unpacked(name: bytes) -> BlockKey:
    """The key that was packed."""
    return BlockKey(name[32:].hex(), name[:32].hex())


class KeyMaker:
    """Makes keys under one secret of 16 to 64 bytes. Stateless and thread-safe.

    `sealed_by` is the id of the key that blocks are encrypted with, if they are: it is part of the
    digest, so that no block in clear, or under another key, is ever found, or replaced, by one that
    is not. Tags do not depend on it.
    """

    __slots__ = ("_sealed_by", "_secret")

    def __init__(self, secret: bytes, *, sealed_by: str = "") -> None:
        if not 16 <= len(secret) <= 64:
            raise InvalidKeyError(f"the secret must be 16 to 64 bytes long, got {len(secret)}")
        self._secret = bytes(secret)
        self._sealed_by = sealed_by

    def __repr__(self) -> str:
        return "KeyMaker(secret=***)"

    def tag(self, namespace: str) -> str:
        """Keyed hash of the namespace: 32 hexadecimal digits. Raises `InvalidKeyError`."""
        try:
            message = namespace.encode()
        except UnicodeEncodeError as exc:
            raise InvalidKeyError(f"a namespace must be valid Unicode, got {namespace!r}") from exc
        return self._hash(b"kvrag tag", message, nbytes=16)

    def key(
        self,
        *,
        namespace: str,
        kind: str,
        fingerprint: str,
        codec: str,
        codec_version: int,
        codec_digest: str,
        prefix_ids: Sequence[int],
        token_ids: Sequence[int],
        context: bytes = b"",
    ) -> BlockKey:
        """The key of one block.

        `prefix_ids` are the token ids of the corpus prefix, `token_ids` those of the block; each
        fits 32 bits. `context` names what else went into a `fragment` (which must have one) or a
        `swap`; a `chunk` has none, because nothing else may go into it.

        Raises `InvalidKeyError` for an unknown kind, a context that does not fit the kind, or a
        token id out of range.
        """
        if kind not in KINDS:
            raise InvalidKeyError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "chunk" and context:
            raise InvalidKeyError("a chunk has no context; KV out of a request is a fragment")
        if kind == "fragment" and not context:
            raise InvalidKeyError("a fragment needs the digest of the context it came out of")
        # msgpack prefixes every part with its type and length: no two different lists of parts
        # give the same bytes.
        parts = [
            _SCHEME,
            namespace,
            kind,
            fingerprint,
            codec,
            codec_version,
            codec_digest,
            _packed_ids(prefix_ids),
            _packed_ids(token_ids),
            bytes(context),
        ]
        if self._sealed_by:
            parts.append(self._sealed_by)
        try:
            message = msgpack.packb(parts, use_bin_type=True)
        except UnicodeEncodeError as exc:
            raise InvalidKeyError("the parts of a key must be valid Unicode") from exc
        digest = self._hash(b"kvrag block", message, nbytes=32)
        return BlockKey(self.tag(namespace), digest)

    def _hash(self, purpose: bytes, message: bytes, *, nbytes: int) -> str:
        return hashlib.blake2b(
            message, digest_size=nbytes, key=self._secret, person=purpose
        ).hexdigest()


def _packed_ids(token_ids: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error as exc:
        raise InvalidKeyError("token ids must be whole numbers from 0 to 2**32 - 1") from exc
