"""What `kvrag bench store` measures with, and the words that its sections share."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvrag.bench.peers import PeerOption
from kvrag.store.block import Block, encode_block
from kvrag.store.keys import BlockKey
from kvrag.store.reader import BlockReader
from kvrag.store.tiered import TieredStore

__all__ = [
    "Row",
    "Section",
    "Skipped",
    "StoreOptions",
    "Target",
    "check",
    "get",
    "make_blocks",
]

FINGERPRINT = "benchmark"
_HEADS = 3


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Layers a block, tokens, bytes a layer, blocks, and how often each contestant has them all.

    folder: on the disk to measure; files are made in a folder of its own there. peers: other
    stores, `peer_timeout_s` for each of their answers.
    """

    layers: int = 30
    layer_nbytes: int = 196_608
    blocks: int = 4
    repetitions: int = 20
    tokens: int = 256
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    peers: tuple[PeerOption, ...] = ()
    peer_timeout_s: float = 600.0

    @property
    def nbytes(self) -> int:
        """Bytes of KV of a block, without its header."""
        return self.layers * self.layer_nbytes


class Skipped(Exception):
    """A section, or a contestant, that cannot be measured here; the message says why."""


class Row(NamedTuple):
    """A line of the table: who, milliseconds a block, GB/s, and how that relates to a baseline."""

    who: str
    ms: object = ""
    gb_s: object = ""
    relation: str = ""


class Target(NamedTuple):
    """What a figure should be: at least `wanted`, or at most if `at_most`."""

    name: str
    measured: float
    wanted: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


@dataclass(frozen=True, slots=True)
class Section:
    """One section: its part of the JSON line, its lines of the table, its targets."""

    figures: Mapping[str, Any]
    rows: tuple[Row, ...]
    targets: tuple[Target, ...] = ()


def make_blocks(options: StoreOptions, *, layer_nbytes: int | None = None) -> list[Block]:
    """Blocks of bfloat16 in the raw codec's shape, with random contents and keys."""
    nbytes = options.layer_nbytes if layer_nbytes is None else layer_nbytes
    shape = (
        options.layers,
        _HEADS,
        options.tokens,
        max(1, nbytes // (4 * _HEADS * options.tokens)),
    )
    tag = secrets.token_hex(16)
    return [
        encode_block(
            key=BlockKey(tag, secrets.token_hex(32)),
            kind="chunk",
            fingerprint=FINGERPRINT,
            token_ids=range(options.tokens),
            k_shape=shape,
            v_shape=shape,
            dtype="bfloat16",
            codec="raw",
            codec_version=1,
            codec_digest="",
            segments=[secrets.token_bytes(nbytes) for _ in range(options.layers)],
        )
        for _ in range(options.blocks)
    ]


def get(store: TieredStore, block: Block) -> list[memoryview]:
    """All layers of a block as a request has them: opened, read, verified."""
    with opened(store, block, whole=True) as reader:
        return reader.read(0, len(block.segments))


def opened(store: TieredStore, block: Block, *, whole: bool = False) -> BlockReader:
    """Raises `RuntimeError` if it is not there."""
    header = block.header
    reader = store.open(
        header.key, fingerprint=FINGERPRINT, token_ids=header.token_ids, whole=whole
    )
    if reader is None:
        raise RuntimeError("a block that was just written is not there")
    return reader


def check(brought: Sequence[bytes | memoryview], block: Block) -> None:
    """Raises `RuntimeError` if these are not the block's segments."""
    pairs = zip(brought, block.segments, strict=False)
    if len(brought) != len(block.segments) or not all(
        np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs
    ):
        raise RuntimeError("other bytes came than were put")
