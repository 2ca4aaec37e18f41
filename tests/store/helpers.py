"""Blocks to test with: small, and different for every seed."""

from __future__ import annotations

import hashlib
import random

from kvrag.store.block import Block, encode_block
from kvrag.store.keys import BlockKey

FINGERPRINT = "model-1"


def make_key(name: int | str, tag: str = "a" * 32) -> BlockKey:
    return BlockKey(tag, hashlib.sha256(str(name).encode()).hexdigest())


def token_ids(name: int | str, tokens: int = 3) -> tuple[int, ...]:
    return tuple(random.Random(f"ids {name}").sample(range(50_000), tokens))


def make_block(
    name: int | str,
    *,
    version: int = 0,
    layers: int = 2,
    segment_nbytes: int = 100,
    tokens: int = 3,
    tag: str = "a" * 32,
    **changes,
) -> Block:
    """The chunk of that name; another `version` has the same key and other bytes."""
    rng = random.Random(f"{name} {version}")
    arguments = {
        "key": make_key(name, tag),
        "kind": "chunk",
        "fingerprint": FINGERPRINT,
        "token_ids": token_ids(name, tokens),
        "k_shape": (layers, 1, tokens, 4),
        "v_shape": (layers, 1, tokens, 4),
        "dtype": "float32",
        "codec": "raw",
        "codec_version": 1,
        "codec_digest": "",
        "segments": [rng.randbytes(segment_nbytes) for _ in range(layers)],
    }
    return encode_block(**(arguments | changes))


def whole_bytes(block: Block) -> bytes:
    """The block as it lies in a file."""
    return b"".join((block.header_bytes, *block.segments))
