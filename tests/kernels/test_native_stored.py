"""Stored chunks checked, decoded and placed in one native call, against doing each apart."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
import torch
import xxhash

from kvrag.kernels.native import NativeUnpack, StoredKV, StoredSegment, put_chunks, put_stored
from kvrag.store.codecs import GroupedCodec, Layout, RawCodec
from tests.store.helpers import make_block

LAYERS = 3
SIZES = (7, 33, 300)
#: KV heads and numbers a head: a small one, SmolLM2-135M, Gemma 3 270M, and one of no power of two.
SHAPES = [(2, 16), (3, 64), (1, 256), (2, 80)]
CODECS = ["raw", "int8", "int4"]
DTYPES = {"raw": ["float32", "bfloat16", "float16"]}
CASES = [(c, d) for c in CODECS for d in DTYPES.get(c, ["float32", "bfloat16"])]


@pytest.mark.parametrize("length", [241, 255, 256, 1023, 1024, 1025, 1088, 4096, 8191, 200_000])
def test_the_checksum_is_xxh3(native, length):
    text = np.random.default_rng(length).integers(0, 256, length + 3, dtype=np.uint8)
    for skipped in (0, 3):  # any alignment
        data = text[skipped : skipped + length]
        found = native.library.xxh3_64(data.ctypes.data_as(ctypes.c_void_p), length)
        assert found == xxhash.xxh3_64_intdigest(data.tobytes())


def made(name, shape, native=None):
    """A codec with fine channels: none in some heads, nearly all in others, odd numbers of them."""
    heads, dim = shape
    unpack = None if native is None else NativeUnpack(native)
    if name == "raw":
        return RawCodec()
    every = [[list(range(head, dim, 1 + 3 * head + layer)) for head in range(heads)]
             for layer in range(LAYERS)]  # fmt: skip
    every[1] = [[] for _ in range(heads)]
    return GroupedCodec(int(name[3:]), fine=every if name == "int4" else (), unpack=unpack)


class Chunk:
    """A chunk as a store holds it, in one piece of memory, and its numbers."""

    def __init__(self, codec, shape, n, dtype, *, start, native=None):
        heads, dim = shape
        random = torch.Generator().manual_seed(n)
        kv = torch.randn(LAYERS, 2, heads, n, dim, generator=random).to(getattr(torch, dtype))
        parts = [codec.encode(k, v, layer=layer) for layer, (k, v) in enumerate(kv)]
        sizes = (LAYERS, heads, n, dim)
        block = make_block(n, tokens=n, k_shape=sizes, v_shape=sizes, dtype=dtype, segments=parts)
        self.start, self.n, self.layout = start, n, codec.layout(block.header)
        self.decoded = [codec.decode(part, block.header) for part in block.segments]
        self.memory = bytearray(b"".join(block.segments))
        self.sizes = [len(part) for part in block.segments]
        self.places = [sum(self.sizes[:layer]) for layer in range(LAYERS)]
        self.lengths = [part.length for part in block.header.segments]
        self.checksums = [part.checksum for part in block.header.segments]

    def stored(self, *, verified=False):
        kv = StoredKV(self.layout)
        view = memoryview(self.memory)
        rows = zip(self.places, self.sizes, self.lengths, self.checksums, strict=True)
        kv.hold(0, view, [StoredSegment(*row[:3], None if verified else row[3]) for row in rows])
        return kv


class Prompt:
    def __init__(self, name, shape, dtype, native):
        codec, at, self.shape = made(name, shape, native), 3, shape
        self.chunks = []
        for n in SIZES:
            self.chunks.append(Chunk(codec, shape, n, dtype, start=at))
            at += n
        random = torch.Generator().manual_seed(99)
        rotary = shape[1] // 2 if shape[1] == 80 else shape[1]
        self.end = at
        self.tables = tuple(torch.randn(at + 2, rotary, generator=random) for _ in range(2))

    def caches(self):
        heads, dim = self.shape
        return torch.full((heads, self.end, dim), 7.0), torch.full((heads, self.end, dim), 8.0)

    def put(self, native, layer, *, verified=False, wanted=(0, 1, 2)):
        caches = self.caches()
        chunks = [self.chunks[i] for i in wanted]
        pairs = [(chunk.stored(verified=verified), chunk.start) for chunk in chunks]
        return put_stored(native, layer, pairs, self.tables, *caches), caches


def prompt(native, name="int4", shape=(3, 64), dtype="bfloat16"):
    return Prompt(name, shape, dtype, native)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_what_is_placed_is_what_was_decoded_and_then_placed_bit_for_bit(native, name, dtype, shape):
    """By native code and by torch alike: which of them decodes, nobody can tell."""
    for decoder in (native, None):
        given = Prompt(name, shape, dtype, decoder)
        for layer in range(LAYERS):
            for wanted in ([0, 1, 2], [2, 0], [1], []):
                expected = given.caches()
                put = [(*given.chunks[i].decoded[layer], given.chunks[i].start) for i in wanted]
                put_chunks(native, put, given.tables, *expected)
                for verified in (False, True):
                    bad, found = given.put(native, layer, verified=verified, wanted=wanted)
                    assert bad == []
                    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", CODECS)
def test_threads_and_layers_without_rope_change_nothing(native, name):
    given = prompt(native, name)
    one = given.put(native, 0)[1]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = given.put(native, 0)[1]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))
    given.tables = None
    k, v = given.put(native, 0)[1]
    for chunk in given.chunks:
        here = slice(chunk.start, chunk.start + chunk.n)
        assert torch.equal(k[:, here], chunk.decoded[0][0].float())
        assert torch.equal(v[:, here], chunk.decoded[0][1].float())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("at", ["first", "middle", "filled", "padding", "last"])
def test_one_flipped_bit_is_found_and_nothing_of_its_segment_is_written(native, name, layer, at):
    given = prompt(native, name)
    chunk = given.chunks[1]
    length = chunk.lengths[layer]
    place = {"first": 0, "middle": length // 2, "filled": length - 1, "padding": length}
    chunk.memory[chunk.places[layer] + place.get(at, chunk.sizes[layer] - 1)] ^= 1
    for other in range(LAYERS):
        bad, (k, v) = given.put(native, other)
        assert bad == ([1] if other == layer else [])
        here = slice(chunk.start, chunk.start + chunk.n)
        assert bool((k[:, here] != 7).any() or (v[:, here] != 8).any()) == (other != layer)
        assert bool((k[:, 3 : chunk.start] != 7).any())


def test_padding_must_be_zero_even_where_the_checksum_fits(native):
    given = prompt(native)
    chunk = given.chunks[2]
    end = chunk.places[1] + chunk.sizes[1]
    chunk.memory[end - 1] = 1
    chunk.checksums[1] = xxhash.xxh3_64_intdigest(chunk.memory[chunk.places[1] : end])
    assert [given.put(native, layer)[0] for layer in range(LAYERS)] == [[], [2], []]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("verified", [False, True])
def test_a_segment_that_is_too_short_for_its_codes_is_not_read(native, name, verified):
    """Its checksum fits: it was written so."""
    given = prompt(native, name)
    given.chunks[0].lengths[2] -= 1
    bad, (k, v) = given.put(native, 2, verified=True)
    assert bad == [0]
    assert bool((k[:, 3:10] == 7).all() and (v[:, 3:10] == 8).all())
    # So it is if it says of more of its channels that they are fine than there is room for.
    given = prompt(native, "int4")
    chunk = given.chunks[2]
    masks = chunk.places[1] + 2 * (3 * 2 * 2 * 64 + 3 * 300)  # behind scales and steps
    assert not any(chunk.memory[masks : masks + 24])
    chunk.memory[masks : masks + 24] = b"\xff" * 24
    segment = chunk.memory[chunk.places[1] :][: chunk.sizes[1]]
    chunk.checksums[1] = xxhash.xxh3_64_intdigest(segment)
    assert given.put(native, 1, verified=verified)[0] == [2]


def test_many_threads_place_the_same_segments(native):
    given = prompt(native)
    expected = given.put(native, 0)[1]
    chunks = [(chunk.stored(), chunk.start) for chunk in given.chunks]
    found = [given.caches() for _ in range(4)]

    def place(caches):
        for _ in range(5):
            assert put_stored(native, 0, chunks, given.tables, *caches) == []

    threads = [threading.Thread(target=place, args=(caches,)) for caches in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for caches in found for a, b in zip(caches, expected, strict=True))


def test_segments_keep_their_memory_until_they_are_released(native):
    kv = StoredKV(Layout(torch.float32, (1, 2, 8)))
    kv.hold(4, memoryview(bytes(range(128))), [StoredSegment(0, 128, 128, None)])
    assert 4 in kv
    assert 0 not in kv
    k, v = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
    assert put_stored(native, 4, [(kv, 0)], None, k, v) == []
    assert kv.release(4) == bytes(range(128))
    assert 4 not in kv
    whole = torch.cat((k, v)).view(torch.uint8).flatten()
    assert bytes(whole.tolist()) == bytes(range(128))


def test_what_does_not_fit_is_refused(native):
    shape = (2, 7, 16)
    for wrong in (
        Layout(torch.float64, shape),
        Layout(torch.float16, shape, 8, 1, 1),
        Layout(torch.float32, shape, 5, 1, 1),
        Layout(torch.float32, shape, 4, 0, 1),
        Layout(torch.float32, shape, 4, 8, 1),
        Layout(torch.float32, shape, 4, 1, 3),
        Layout(torch.float32, shape, 4, 1, 0),
        Layout(torch.float32, (2, 7, 0)),
    ):
        assert not StoredKV.takes(wrong)
        with pytest.raises(ValueError, match="cannot place"):
            StoredKV(wrong)
    kv = StoredKV(Layout(torch.float32, shape))
    for start, nbytes, length, checksum in (
        (0, 4096, 4097, 0),
        (1, 4096, 4096, 0),
        (-1, 4096, 4096, 0),
        (0, 240, 240, 0),
    ):
        with pytest.raises(ValueError, match="a segment has"):
            kv.hold(0, memoryview(bytes(4096)), [StoredSegment(start, nbytes, length, checksum)])
    given = prompt(native)
    chunk = given.chunks[2]
    stored = chunk.stored()
    for layer, start, room, match in (
        (0, chunk.start, (3, given.end - 1, 64), "not within"),
        (0, -1, (3, given.end, 64), "not within"),
        (3, chunk.start, (3, given.end, 64), "layer 3"),
        (0, chunk.start, (2, given.end, 64), "does not fit"),
        (0, chunk.start, (3, given.end, 32), "does not fit"),
    ):
        with pytest.raises(ValueError, match=match):
            put_stored(native, layer, [(stored, start)], None, torch.zeros(room), torch.zeros(room))
