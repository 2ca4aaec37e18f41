from __future__ import annotations

import struct

import msgpack
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.store import header as header_module
from kvrag.store import header_bytes
from kvrag.store.block import (
    ALIGNMENT,
    MAGIC,
    MAX_HEADER_NBYTES,
    SegmentInfo,
    decode_header,
    encode_block,
    encode_header,
    header_region_nbytes,
    verify_segment,
)
from kvrag.store.errors import BlockFormatError, StoreError

from .helpers import make_block, make_key, token_ids, whole_bytes


def forge(fields, *, packed=None):
    """A header region of any fields, with a checksum that fits: an attacker can make one too."""
    packed = msgpack.packb(fields) if packed is None else packed
    preamble = struct.pack("<8sII", MAGIC, 1, len(packed))
    body = packed + bytes(-(24 + len(packed)) % ALIGNMENT)
    checksum = xxhash.xxh3_64_intdigest(preamble + body)
    return preamble + struct.pack("<Q", checksum) + body


def fields_of(block):
    (length,) = struct.unpack_from("<I", block.header_bytes, 12)
    return msgpack.unpackb(block.header_bytes[24 : 24 + length])


def check(data, key=None):
    """Every check there is on a whole block."""
    header = decode_header(data, expect_key=key)
    if len(data) != header.nbytes:
        raise BlockFormatError("size")
    for index, part in enumerate(header.segments):
        verify_segment(header, index, data[part.offset : part.end])
    return header


def test_layout():
    block = make_block(1, layers=3, segment_nbytes=5000, extra={"made": "now", "ratio": 0.5})
    data = whole_bytes(block)
    assert data[:8] == b"\x89KVRAG\r\n"
    assert struct.unpack_from("<I", data, 8) == (1,)
    assert check(data) == block.header
    assert block.header.header_nbytes == len(block.header_bytes) == header_region_nbytes(data[:16])
    assert [part.offset for part in block.header.segments] == [4096, 4096 + 8192, 4096 + 2 * 8192]
    assert block.nbytes == len(data) == 4096 + 3 * 8192
    assert all(not any(segment[5000:]) for segment in block.segments)
    assert dict(block.header.extra) == {"made": "now", "ratio": 0.5}


def test_the_format_is_frozen():
    """A change of these bytes makes every stored block unreadable: it takes a new version."""
    block = encode_block(
        key=make_key("frozen"),
        kind="chunk",
        fingerprint="f",
        token_ids=[1, 2],
        k_shape=(1, 1, 2, 2),
        v_shape=(1, 1, 2, 2),
        dtype="float32",
        codec="raw",
        codec_version=1,
        codec_digest="",
        segments=[bytes(range(32))],
        extra={"a": 1, "b": 2.0, "c": b"x", "d": "y"},
    )
    assert xxhash.xxh3_64_hexdigest(whole_bytes(block)) == "be1093983dea5c0b"


def test_every_flipped_bit_is_found():
    block = make_block(1, layers=2, segment_nbytes=60, extra={"a": 1})
    data = bytearray(whole_bytes(block))
    check(data)
    unseen = []
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            try:
                check(data)
                unseen.append((position, bit))
            except BlockFormatError:
                pass
            data[position] ^= 1 << bit
    assert not unseen
    check(data)


def test_padding_that_is_not_zero_is_damage_even_under_a_checksum_that_fits():
    block = make_block(1, layers=1, segment_nbytes=4096)
    fields = fields_of(block)
    fields["segments"][0][1] = 4000  # shorter: the rest is padding now
    header = decode_header(forge(fields))
    with pytest.raises(BlockFormatError, match="padding"):
        verify_segment(header, 0, block.segments[0])


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip(data):
    layers = data.draw(st.integers(1, 5))
    ids = data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=40))
    shape = (layers, 2, len(ids), 3)
    contents = data.draw(
        st.lists(st.binary(min_size=1, max_size=9000), min_size=layers, max_size=layers)
    )
    extra = data.draw(
        st.dictionaries(
            names,
            st.text(st.characters(codec="utf-8"), max_size=20)
            | st.integers(-(2**63), 2**64 - 1)
            | st.floats(allow_nan=False)
            | st.binary(max_size=50),
            max_size=5,
        )
    )
    block = encode_block(
        key=make_key(data.draw(st.integers())),
        kind=data.draw(st.sampled_from(["chunk", "fragment", "swap", "vectors"])),
        fingerprint=data.draw(names),
        token_ids=ids,
        k_shape=shape,
        v_shape=shape,
        dtype="bfloat16",
        codec=data.draw(names),
        codec_version=data.draw(st.integers(0, 2**32 - 1)),
        codec_digest=data.draw(st.text("0123456789abcdef", max_size=64)),
        segments=contents,
        extra=extra,
    )
    encoded = whole_bytes(block)
    header = check(encoded, block.header.key)
    assert header == block.header
    assert encode_header(header) == block.header_bytes
    assert header.token_ids == tuple(ids)
    assert dict(header.extra) == extra
    for part, content in zip(header.segments, contents, strict=True):
        assert encoded[part.offset : part.offset + part.length] == content


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200), fits=st.booleans())
def test_random_bytes_are_refused_with_a_typed_error(data, fits):
    with pytest.raises(BlockFormatError):
        decode_header(forge(None, packed=data) if fits else data)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=9) | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(header_bytes._FIELDS), value=json_like)
def test_a_field_of_any_other_type_or_value_never_passes_unchecked(name, value):
    fields = fields_of(make_block(1)) | {name: value}
    try:
        header = decode_header(forge(fields))
    except StoreError:
        return
    # What passes is a block that could have been written.
    assert encode_header(header) == forge(fields)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "text"}, "kind must be one of"),
        ({"kind": ["chunk"]}, "kind must be one of"),
        ({"key": "../../etc/passwd"}, "no key"),
        ({"key": "a" * 32 + "/../" + "b" * 61}, "no key"),
        ({"key": b"\0" * 97}, "no key"),
        ({"token_ids": b"\0" * 13}, "4 bytes each"),
        ({"token_ids": b"\0" * 16}, "token ids do not fit"),
        ({"k_shape": [2, 1, 3]}, "k_shape"),
        ({"k_shape": [2, 1, 4, 4]}, "do not fit"),
        ({"k_shape": [2, 1, 3, -4]}, "k_shape"),
        ({"k_shape": [2, 1, 3, True]}, "k_shape"),
        ({"v_shape": [2.0, 1, 3, 4]}, "v_shape"),
        ({"v_shape": [3, 1, 3, 4]}, "one segment a layer"),
        ({"dtype": ""}, "dtype"),
        ({"dtype": "x" * 257}, "dtype"),
        ({"fingerprint": None}, "fingerprint"),
        ({"codec_version": -1}, "codec version"),
        ({"codec_version": 1.0}, "codec version"),
        ({"segments": []}, "at least one segment"),
        ({"segments": {}}, "must be a list"),
        ({"segments": [[4096, 100, 1]]}, "one segment a layer"),
        ({"segments": [[4096, 100], [8192, 100, 1]]}, "offset, length and checksum"),
        ({"segments": [[4096, 0, 1], [4096, 100, 1]]}, "length of segment 0"),
        ({"segments": [[4096, -5, 1], [8192, 100, 1]]}, "length of segment 0"),
        ({"segments": [[4096, 2**62, 1], [8192, 100, 1]]}, "length of segment 0"),
        ({"segments": [[0, 100, 1], [4096, 100, 1]]}, "offset of segment 0"),
        ({"segments": [[4097, 100, 1], [8193, 100, 1]]}, "multiples of 4096"),
        ({"segments": [[4096, 100, 1], [4096, 100, 1]]}, "multiples of 4096"),
        ({"segments": [[4096, 100, 1], [12288, 100, 1]]}, "multiples of 4096"),
        ({"segments": [[8192, 100, 1], [12288, 100, 1]]}, "not behind the header"),
        ({"segments": [[4096, 100, -1], [8192, 100, 1]]}, "checksum of segment 0"),
        ({"extra": []}, "extra must be a map"),
        ({"extra": {"a": None}}, "extra 'a'"),
        ({"extra": {"a": True}}, "extra 'a'"),
        ({"extra": {"a": [1]}}, "extra 'a'"),
        ({"extra": {str(i): i for i in range(65)}}, "at most 64"),
    ],
)
def test_hostile_fields(change, sentence):
    with pytest.raises(BlockFormatError, match=sentence):
        decode_header(forge(fields_of(make_block(1)) | change))


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        b"\xdf\xff\xff\xff\xff",  # a map of four thousand million entries
        b"\xdd\xff\xff\xff\xff",  # a list of as many
        b"\xc6\xff\xff\xff\xff",  # bytes of as many
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 60_000,  # lists in lists in lists
        b"\x81\xa1a" * 20_000,
        b"\xdc\xea\x60" + b"\x90" * 60_000,
        b"\xd6\xff\xff\xff\xff\xff",  # a time stamp
        b"\xc7\x0c\xff" + b"\xff" * 12,
        b"\x81\x90\x01",  # a list as the name of an entry
        b"\xa1\xff",  # no valid text
        msgpack.packb({}) + b"\0",
    ],
    ids=range(14),
)
def test_msgpack_bombs(packed):
    with pytest.raises(BlockFormatError):
        decode_header(forge(None, packed=packed))


def test_a_header_has_one_encoding():
    fields = fields_of(make_block(1))
    reordered = dict(reversed(fields.items()))
    for other in (reordered, fields | {"more": 1}, {k: fields[k] for k in list(fields)[1:]}):
        with pytest.raises(BlockFormatError, match="fields"):
            decode_header(forge(other))
    # The same number written longer than it need be.
    packed = msgpack.packb(fields).replace(
        b"\xadcodec_version\x01", b"\xadcodec_version\xcd\x00\x01"
    )
    with pytest.raises(BlockFormatError, match="one encoding"):
        decode_header(forge(None, packed=packed))


def test_truncated_headers():
    data = make_block(1).header_bytes
    for size in range(0, len(data), 7):
        with pytest.raises(BlockFormatError):
            decode_header(data[:size])


@pytest.mark.parametrize("length", [MAX_HEADER_NBYTES - 23, 2**20, 2**32 - 1])
def test_an_oversized_header_is_refused_before_it_is_read(length):
    preamble = struct.pack("<8sII", MAGIC, 1, length)
    with pytest.raises(BlockFormatError, match="at most"):
        header_region_nbytes(preamble)
    with pytest.raises(BlockFormatError, match="at most"):
        decode_header(preamble + bytes(MAX_HEADER_NBYTES))


def test_another_version_says_so():
    data = struct.pack("<8sII", MAGIC, 2, 100) + bytes(8192)
    with pytest.raises(BlockFormatError, match="version 2, this program reads 1"):
        decode_header(data)


def test_another_key_is_refused():
    data = make_block(1).header_bytes
    assert decode_header(data, expect_key=make_key(1)).key == make_key(1)
    with pytest.raises(BlockFormatError, match="expected"):
        decode_header(data, expect_key=make_key(2))


def test_a_segment_of_the_wrong_length_is_damage():
    block = make_block(1)
    for view in (b"", block.segments[0][:-1], bytes(block.segments[0]) + b"\0"):
        with pytest.raises(BlockFormatError, match="must be 4096 bytes"):
            verify_segment(block.header, 0, view)


def test_two_thousand_tokens_and_128_layers_fit_the_header():
    ids = np.arange(2048) + 2**31
    shape = (128, 8, 2048, 128)
    block = make_block(
        1, layers=128, tokens=2048, token_ids=ids, k_shape=shape, v_shape=shape, segment_nbytes=1
    )
    assert block.header.header_nbytes <= MAX_HEADER_NBYTES
    assert decode_header(block.header_bytes).token_ids == tuple(ids.tolist())


def test_overhead_of_256_tokens_is_below_two_percent():
    layer_nbytes = 2 * 3 * 256 * 64 * 2  # SmolLM2-135M in bfloat16
    shape = (30, 3, 256, 64)
    block = make_block(
        1, layers=30, tokens=256, k_shape=shape, v_shape=shape, segment_nbytes=layer_nbytes
    )
    assert block.nbytes <= 1.02 * 30 * layer_nbytes


def test_a_header_too_big_is_refused_at_encode():
    shape = (2, 1, 20_000, 4)
    with pytest.raises(BlockFormatError, match="at most 65536"):
        make_block(1, tokens=20_000, k_shape=shape, v_shape=shape)
    with pytest.raises(BlockFormatError, match="at most 65536"):
        make_block(1, extra={str(i): b"x" * 2000 for i in range(40)})


@pytest.mark.parametrize("tokens", [*range(880, 1000, 3), 1024])
def test_headers_at_the_edge_of_a_page(tokens):
    shape = (2, 1, tokens, 4)
    block = make_block(1, tokens=tokens, k_shape=shape, v_shape=shape)
    assert check(whole_bytes(block)) == block.header


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": (-1, 0, 1)},
        {"token_ids": (2**32, 0, 1)},
        {"kind": "other"},
        {"k_shape": (2, 1, 3)},
        {"segments": []},
        {"segments": [b"", b"x"]},
        {"dtype": "\ud800"},
        {"extra": {"a": None}},
    ],
)
def test_encode_refuses_what_decode_would(change):
    with pytest.raises(BlockFormatError):
        make_block(1, **change)


def test_segments_may_be_any_contiguous_buffer():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    block = make_block(1, segments=[array, bytearray(b"x")])
    assert block.segments[0][:96] == array.tobytes()
    assert all(segment.readonly for segment in block.segments)


def test_a_header_is_hashable_and_cannot_be_changed():
    block = make_block(1, extra={"a": 1})
    assert hash(block.header) == hash(make_block(1, extra={"a": 1}).header)
    with pytest.raises(AttributeError):
        block.header.kind = "swap"
    with pytest.raises(TypeError):
        block.header.extra["a"] = 2
    assert block.header.token_ids == token_ids(1)


rows = st.tuples(
    st.sampled_from([0, 4096, 4097, 8192, 12288, 2**62, 2**62 + 4096, True, 4096.0]),
    st.sampled_from([0, 1, 4096, 4097, 2**40, 2**40 + 1, True, 1.0]),
    st.sampled_from([0, 2**64 - 1, 2**64, -1, True, 1.0]),
)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(rows, min_size=1, max_size=3), follow=st.booleans())
def test_segments_checked_at_once_are_those_that_pass_one_by_one(rows, follow):
    segments = [SegmentInfo(*row) for row in rows]
    if follow and all(type(part.length) is int for part in segments):
        for index in range(1, len(segments)):
            segments[index] = segments[index]._replace(offset=segments[index - 1].end)
    try:
        header_module._check_each(segments)
        sound = True
    except BlockFormatError:
        sound = False
    assert header_module._are_sound(segments) == sound
