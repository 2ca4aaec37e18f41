"""Blocks in a Redis (or Valkey): standalone, behind Sentinel, or a Cluster; see redis_address.py.

A block is one key, `<prefix><tag>/<digest>`, a hash of these fields:

    h        the header region, as it starts a block in a file
    s        16 bytes: the size of the whole block, and the checksum of `h`; little-endian
    0, 1, …  the padded segments

It is written in one transaction together with its time to live, and any layers of it are read by
one `HMGET`, which is atomic: what is read is of one version. `s` tells versions apart, so that a
header that is kept here need not be read again, and tells sizes without reading blocks.

Redis outlives the process, but it may drop a block at any time: at its `maxmemory`, when its time
is over, or with a server that keeps nothing on disk. What it dropped is a miss. So the tier is not
durable: it is never counted on to hold the last copy.

Several processes and machines may share one Redis. What others write is found when it is asked
for, and listed by `entries`, `keys` and `nbytes`, which walk over all keys of the database (SCAN).
"""

from __future__ import annotations

import math
import struct
from itertools import islice
from typing import TYPE_CHECKING, Any

from .block import BlockHeader, decode_header
from .buffers import BufferPool
from .errors import BlockFormatError, InvalidKeyError
from .header_bytes import PREAMBLE_NBYTES
from .keys import BlockKey
from .limits import LONGEST_TTL_S
from .recent import Recent
from .redis_address import RedisAddress
from .redis_link import Command, RedisLink
from .tier import StoredBlock, Tier, check_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .block import Block
    from .tier import Arrived

__all__ = ["RedisTier"]

#: A field of a hash: small ones are bytes, a layer may be a view of memory that is used again.
_Value = bytes | memoryview | None

_HEADER, _STAMP = b"h", b"s"
_STAMP_BYTES = struct.Struct("<Q8s")
_CHECKSUM = slice(PREAMBLE_NBYTES, PREAMBLE_NBYTES + 8)
_SCAN_COUNT = 1000
#: Keys a pipeline of a batch: with headers, half a MiB of answers.
_BATCH = 128
_MAX_PREFIX = 64
#: Layers asked for with a header before any block was seen.
_FIRST_GUESS = 32
#: Memory kept for the next answers: what a prompt of 4,096 tokens takes of a small model.
_KEPT_NBYTES = 2**27


class RedisTier(Tier):
    """Blocks in the Redis that `url` names. Segments it returns are memory of their own.

    Nothing is connected before the first use. Raises `RedisUrlError` for a URL that names no Redis,
    `ValueError` for a limit or prefix that is none, `ImportError` without redis-py.
    """

    durable = False

    def __init__(
        self,
        url: str,
        name: str = "redis",
        *,
        prefix: str = "kvrag:",
        ttl_s: float | None = None,
        connect_timeout_s: float = 1.0,
        timeout_s: float = 1.0,
        connections: int = 16,
    ) -> None:
        """`ttl_s`: seconds after which a block goes that was neither written nor read from here.

        At most `LONGEST_TTL_S`.
        """
        for what, value in (
            ("ttl_s", 1.0 if ttl_s is None else ttl_s),
            ("connect_timeout_s", connect_timeout_s),
            ("timeout_s", timeout_s),
            ("connections", connections),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"{what} of tier {name} must be more than 0, got {value}")
        if ttl_s is not None and ttl_s > LONGEST_TTL_S:
            raise ValueError(f"ttl_s of tier {name} is at most {LONGEST_TTL_S:g}, got {ttl_s}")
        if len(prefix) > _MAX_PREFIX or not prefix.isprintable():
            raise ValueError(
                f"prefix of tier {name} must be at most {_MAX_PREFIX} printable characters, "
                f"got {prefix!r:.100}"
            )
        self.name = name
        self._prefix = prefix.encode()
        self._ttl_ms = None if ttl_s is None else max(1, round(1000 * ttl_s))
        self._address = RedisAddress.parse(url)
        #: Headers, each with the stamp of its version.
        self._headers: Recent[tuple[bytes, BlockHeader]] = Recent()
        self._layers = _FIRST_GUESS
        self._buffers = BufferPool(_KEPT_NBYTES)
        self._link = RedisLink(
            self._address,
            name,
            connect_timeout_s=connect_timeout_s,
            timeout_s=timeout_s,
            connections=connections,
            buffers=self._buffers,
        )

    def __repr__(self) -> str:
        return f"RedisTier({str(self._address)!r}, {self.name!r})"

    def header(self, key: BlockKey) -> BlockHeader | None:
        (reply,) = self._link.run(self._asking_for_header(key))
        return self._header(key, reply)

    def headers(self, keys: Sequence[BlockKey]) -> list[BlockHeader | BlockFormatError | None]:
        found: list[BlockHeader | BlockFormatError | None] = []
        for some in _batches(keys):
            replies = self._link.run(*(self._asking_for_header(key) for key in some))
            for key, reply in zip(some, replies, strict=True):
                try:
                    found.append(self._header(key, reply))
                except BlockFormatError as exc:
                    found.append(exc)
        return found

    def segments(self, key: BlockKey, first: int, last: int) -> list[memoryview] | None:
        if not 0 <= first < last:
            raise ValueError(f"a range of segments needs 0 <= first < last, got {first} and {last}")
        stamp, header = self._headers.get(key) or (None, None)
        while True:
            with_header = [] if header is not None else [_HEADER]
            fields = [_STAMP, *with_header, *range(first, last)]
            found = self._fields(self._read(key, fields, renew=first == 0), len(fields))
            if found is None or found[0] is None:
                self._headers.forget(key)
            if found is None or not any(value is not None for value in found):
                return None
            if header is None:
                header = self._decode(key, found[1], found[0])
            elif found[0] != stamp:
                header = None  # another version lies there now
                continue
            if last > len(header.segments):
                raise BlockFormatError(f"the block has {len(header.segments)} segments, not {last}")
            return [
                _segment(header, index, value)
                for index, value in enumerate(found[-(last - first) :], start=first)
            ]

    def whole(self, key: BlockKey, arrived: Arrived) -> tuple[BlockHeader, list[memoryview]] | None:
        """See `Tier`. One request, if the block has no more layers than the one looked at last."""
        asked = self._layers
        fields = [_STAMP, _HEADER, *range(asked)]
        found = self._fields(self._read(key, fields, renew=True), len(fields))
        header = None if found is None else self._found(key, found[0], found[1])
        if found is None or header is None:
            return None
        count = len(header.segments)
        segments = [_segment(header, i, value) for i, value in enumerate(found[2:][:count])]
        if count > asked:
            rest = self.segments(key, asked, count)
            if rest is None:
                return None
            segments += rest
        arrived(header, 0, segments)
        return header, segments

    def put(self, key: BlockKey, block: Block) -> None:
        check_key(key, block)
        name = self._name(key)
        head = bytes(block.header_bytes)
        fields: list[Any] = [_HEADER, head, _STAMP, _stamp(block.nbytes, head)]
        for index, segment in enumerate(block.segments):
            fields += (index, segment)
        commands: list[Command] = [("UNLINK", name), ("HSET", name, *fields)]
        if self._ttl_ms is not None:
            commands.append(("PEXPIRE", name, self._ttl_ms))
        _, added, *_ = self._link.run(*commands, atomic=True)
        if added != len(fields) // 2:
            raise self._link.malformed("that it wrote other fields than it was given")

    def delete(self, key: BlockKey) -> bool:
        return self.delete_many([key])[0]

    def delete_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        found: list[bool] = []
        for some in _batches(keys):
            for key in some:
                self._headers.forget(key)
            found += self._counts([("UNLINK", self._name(key)) for key in some])
        return found

    def contains(self, key: BlockKey) -> bool:
        return self.contains_many([key])[0]

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        found: list[bool] = []
        for some in _batches(keys):
            found += self._counts([("EXISTS", self._name(key)) for key in some])
        return found

    def keys(self, tag: str | None = None) -> Iterator[BlockKey]:
        return iter(dict.fromkeys(self._scan(tag)))

    def entries(self) -> list[StoredBlock]:
        """All blocks. The order of use is Redis's own, where its eviction policy keeps one.

        Takes a walk over the database, and of each block 16 bytes. To Redis that is a use of each.
        """
        found: dict[BlockKey, StoredBlock] = {}
        keys = self._scan(None)
        while some := list(islice(keys, _BATCH)):
            replies = self._link.run(
                *(("OBJECT IDLETIME", self._name(key)) for key in some),
                *(("HGET", self._name(key), _STAMP) for key in some),
            )
            for key, idle, stamp in zip(
                some, replies[: len(some)], replies[len(some) :], strict=True
            ):
                if isinstance(stamp, bytes) and len(stamp) == _STAMP_BYTES.size:
                    nbytes, _ = _STAMP_BYTES.unpack(stamp)
                    idle_s = float(idle) if isinstance(idle, int) else 0.0
                    found[key] = StoredBlock(key, nbytes, idle_s)
        return sorted(found.values(), key=lambda entry: -entry.idle_s)

    def idle_s(self, key: BlockKey) -> float | None:
        """None also where Redis keeps no order of use, as with an LFU policy."""
        (reply,) = self._link.run(("OBJECT IDLETIME", self._name(key)))
        return float(reply) if isinstance(reply, int) else None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries())

    def close(self) -> None:
        self._link.close()
        self._headers.clear()
        self._buffers.clear()

    def _name(self, key: BlockKey) -> bytes:
        return self._prefix + str(key).encode()

    def _asking_for_header(self, key: BlockKey) -> Command:
        return "HMGET", self._name(key), _STAMP, _HEADER

    def _read(self, key: BlockKey, fields: Sequence[object], *, renew: bool) -> object:
        commands: list[Command] = [("HMGET", self._name(key), *fields)]
        if renew and self._ttl_ms is not None:
            commands.append(("PEXPIRE", self._name(key), self._ttl_ms))
        return self._link.run(*commands)[0]

    def _header(self, key: BlockKey, reply: object) -> BlockHeader | None:
        found = self._fields(reply, 2)
        return None if found is None else self._found(key, *found)

    def _found(self, key: BlockKey, stamp: _Value, head: _Value) -> BlockHeader | None:
        if stamp is head is None:
            self._headers.forget(key)
            return None
        return self._decode(key, head, stamp)

    def _decode(self, key: BlockKey, head: _Value, stamp: _Value) -> BlockHeader:
        """The header in a block's own fields, kept for the next read. Raises `BlockFormatError`."""
        if head is None or stamp is None:
            raise BlockFormatError(f"the field {(_HEADER if head is None else _STAMP)!r} is gone")
        head, stamp = bytes(head), bytes(stamp)
        header = decode_header(head, expect_key=key)
        if stamp != _stamp(header.nbytes, head):
            raise BlockFormatError("the block has another size or version than its header says")
        self._headers.keep(key, (stamp, header))
        self._layers = len(header.segments)
        return header

    def _fields(self, reply: object, count: int) -> list[_Value] | None:
        """The values of `count` fields. Raises `BlockFormatError` if no hash lies there."""
        if self._link.refused(reply) is not None:
            raise BlockFormatError("what lies in the block's place is no hash")
        if (
            not isinstance(reply, list)
            or len(reply) != count
            or not all(value is None or isinstance(value, bytes | memoryview) for value in reply)
        ):
            raise self._link.malformed("something else than the fields of a hash")
        return reply

    def _counts(self, commands: Sequence[Command]) -> list[bool]:
        """Of commands that each count one key: whether it was there."""
        replies = self._link.run(*commands)
        for reply in replies:
            if self._link.refused(reply) is not None or reply not in (0, 1):
                raise self._link.malformed("something else than how many keys there are")
        return [bool(reply) for reply in replies]

    def _scan(self, tag: str | None) -> Iterator[BlockKey]:
        """Keys of blocks, perhaps one twice; what else lies under the prefix is passed over."""
        literal = b"".join(
            b"\\" + bytes([byte]) if byte in b"*?[]^\\" else bytes([byte]) for byte in self._prefix
        )
        tail = b"*" if tag is None else tag.encode() + b"/*"
        # At once, not when the first is asked for: a tier that is closed says so.
        return self._parsed(self._link.scan(literal + tail, _SCAN_COUNT))

    def _parsed(self, names: Iterator[bytes]) -> Iterator[BlockKey]:
        for name in names:
            try:
                yield BlockKey.parse(name.removeprefix(self._prefix).decode("ascii"))
            except (InvalidKeyError, UnicodeDecodeError):
                continue


def _stamp(nbytes: int, head: bytes) -> bytes:
    return _STAMP_BYTES.pack(nbytes, head[_CHECKSUM])


def _segment(header: BlockHeader, index: int, value: _Value) -> memoryview:
    wanted = header.segments[index].padded_nbytes
    if value is None or len(value) != wanted:
        got = "gone" if value is None else f"{len(value)} bytes long"
        raise BlockFormatError(f"segment {index} must be {wanted} bytes, it is {got}")
    return memoryview(value)


def _batches(keys: Sequence[BlockKey]) -> Iterator[Sequence[BlockKey]]:
    return (keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH))
