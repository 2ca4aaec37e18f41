"""Anything at all in the place of a header: a typed error, or a block that could have been written.

And no more memory and time than a header of 64 KiB deserves, whatever sizes it announces.
HEADER_FUZZ_EXAMPLES=20000 makes it a longer search.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
import tracemalloc

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvrag.store.block import (
    ALIGNMENT,
    MAGIC,
    MAX_HEADER_NBYTES,
    decode_header,
    encode_header,
    header_region_nbytes,
)
from kvrag.store.errors import BlockFormatError

from .helpers import make_block
from .test_block import fields_of, forge

#: Of all allocations for one header; 65,000 empty maps take 4.7 MB.
MOST_NBYTES = 8 * 2**20
MOST_S = 2.0
EXAMPLES = int(os.environ.get("HEADER_FUZZ_EXAMPLES", "200"))

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SOUND = make_block(1, layers=3, segment_nbytes=5000, extra={"a": 1, "b": b"xy", "c": 0.5})
BASE = fields_of(SOUND)

numbers = st.sampled_from(
    [0, 1, -1, 4095, 4096, 4097, 2**31, 2**32, 2**40, 2**40 + 1, 2**60, 2**62, 2**63, 2**64 - 1]
) | st.integers(-(2**63), 2**64 - 1)
leaves = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=20)
    | st.sampled_from(["../" * 30, "a" * 32 + "/" + "b" * 64, "\0", "x" * 300, "chunk"])
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


def bounded(data):
    """Decode within the bounds; the header, or None if it was refused."""
    tracemalloc.start()
    started = time.thread_time()
    try:
        header = None
        with contextlib.suppress(BlockFormatError):
            header_region_nbytes(data)
            header = decode_header(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.thread_time() - started < MOST_S
    assert peak < MOST_NBYTES
    return header


def check(data):
    header = bounded(data)
    if header is not None:
        # What passes is a block that could have been written: the bytes say all there is.
        assert encode_header(header) == bytes(data[: header.header_nbytes])
    return header


def paths(value, path=()):
    """The places in a header's fields, from the outside in."""
    yield path
    inner = enumerate(value) if isinstance(value, list) else []
    for name, part in value.items() if isinstance(value, dict) else inner:
        yield from paths(part, (*path, name))


PLACES = [path for path in paths(BASE) if path]


def changed(value, path, new):
    """A copy with another value at the place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@fuzz
@given(
    places=st.lists(st.sampled_from(PLACES), min_size=1, max_size=3, unique=True), data=st.data()
)
def test_fields_that_are_others(places, data):
    fields = BASE
    for path in places:
        # A place may have gone with one above it.
        with contextlib.suppress(TypeError, KeyError, IndexError):
            fields = changed(fields, path, data.draw(values))
    try:
        packed = msgpack.packb(fields)
    except (OverflowError, ValueError):
        return
    if 24 + len(packed) <= MAX_HEADER_NBYTES:
        check(forge(None, packed=packed))


@fuzz
@given(data=st.data())
def test_numbers_that_are_others(data):
    """Offsets, lengths, checksums and shapes that fit one another, or nearly."""
    fields = fields_of(SOUND)
    for row in fields["segments"]:
        for column in range(3):
            if data.draw(st.booleans()):
                row[column] = data.draw(numbers)
    for name in ("k_shape", "v_shape"):
        if data.draw(st.booleans()):
            fields[name][data.draw(st.integers(0, 3))] = data.draw(numbers)
    check(forge(fields))


@fuzz
@given(
    cuts=st.lists(
        st.tuples(
            st.sampled_from(["flip", "set", "delete", "insert", "double"]),
            st.integers(0, 2**16),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=6,
    ),
    fits=st.booleans(),
)
def test_bytes_that_are_others(cuts, fits):
    """Of the msgpack under a checksum that fits, or of the whole header under the one it had."""
    data = bytearray(msgpack.packb(BASE) if fits else SOUND.header_bytes)
    for act, where, byte in cuts:
        at = where % max(1, len(data))
        if act == "flip" and data:
            data[at] ^= 1 << byte % 8
        elif act == "set" and data:
            data[at] = byte
        elif act == "delete":
            del data[at : at + byte]
        elif act == "insert":
            data[at:at] = bytes([byte]) * (1 + byte % 9)
        elif act == "double":
            data[at:at] = data[at : at + byte]
    check(forge(None, packed=bytes(data)) if fits else bytes(data))


@fuzz
@given(
    data=st.binary(max_size=300), length=st.integers(0, 2**32 - 1), version=st.sampled_from([0, 1])
)
@example(b"", 2**32 - 1, 1)
def test_random_bytes_behind_a_preamble(data, length, version):
    assert check(data) is None
    preamble = struct.pack("<8sII", MAGIC, version, length)
    assert check((preamble + data).ljust(2 * ALIGNMENT, b"\0")) is None


#: msgpack that announces much, or is much: nesting, counts and lengths of every kind.
BOMBS = {
    "array32": b"\xdd" + struct.pack(">I", 10**9),
    "map32": b"\xdf" + struct.pack(">I", 10**9),
    "bin32": b"\xc6" + struct.pack(">I", 2**32 - 1),
    "str32": b"\xdb" + struct.pack(">I", 2**32 - 1),
    "ext32": b"\xc9" + struct.pack(">I", 2**32 - 1) + b"\x01",
    "nested arrays": b"\x91" * 65_000,
    "nested maps": b"\x81\xa1a" * 21_000,
    "nested arrays of 2**32": b"\xdd\xff\xff\xff\xff" * 13_000,
    "many empty lists": b"\xdc\xfd\xe8" + b"\x90" * 65_000,
    "many empty maps": b"\xdc\xfd\xe8" + b"\x80" * 65_000,
    "many times": b"\xdc\x28\x00" + b"\xd6\xff\x00\x00\x00\x01" * 10_240,
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("place", ["alone", *BASE])
def test_bombs(bomb, place):
    """Alone, and in the place of every field, where the fields before it are sound."""
    packed = BOMBS[bomb]
    if place != "alone":
        parts = [
            msgpack.packb(name) + (packed if name == place else msgpack.packb(value))
            for name, value in BASE.items()
        ]
        packed = b"\x8c" + b"".join(parts)
    packed = packed[: MAX_HEADER_NBYTES - 24]
    assert bounded(forge(None, packed=packed)) is None


@pytest.mark.parametrize("rows", [1000, 10_000, 16_000])
def test_as_many_segments_as_fit(rows):
    """No more can be announced than are there: a list of 10**9 is refused above."""
    fields = BASE | {"segments": [[1, 1, 1]] * rows, "k_shape": [rows, 1, 3, 4]}
    packed = msgpack.packb(fields)[: MAX_HEADER_NBYTES - 24]
    assert bounded(forge(None, packed=packed)) is None


@pytest.mark.parametrize("announced", [2**41, 2**60, 2**64 - 1])
def test_segments_of_sizes_that_nothing_has(announced):
    fields = fields_of(SOUND)
    fields["segments"][0][1] = announced
    with pytest.raises(BlockFormatError, match="length of segment 0"):
        decode_header(forge(fields))


def test_the_bounds_are_not_vacuous():
    assert bounded(SOUND.header_bytes) == SOUND.header
    assert check(whole := SOUND.header_bytes + bytes(5)) == SOUND.header
    assert len(whole) > SOUND.header.header_nbytes
