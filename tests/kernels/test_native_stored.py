"""Stored chunks checked and placed in one native call, against checking and placing apart."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
import xxhash

from kvrag.kernels.native import StoredChunks, StoredKV, put_chunks

LAYERS, HEADS, DIM = 3, 2, 16
SIZES = {4: 7, 0: 33, 9: 100}


@pytest.mark.parametrize("length", [241, 255, 256, 1023, 1024, 1025, 1088, 4096, 8191, 200_000])
def test_the_checksum_is_xxh3(native, length):
    text = np.random.default_rng(length).integers(0, 256, length + 3, dtype=np.uint8)
    for skipped in (0, 3):  # any alignment
        data = text[skipped : skipped + length]
        found = native.library.xxh3_64(data.ctypes.data_as(ctypes.c_void_p), length)
        assert found == xxhash.xxh3_64_intdigest(data.tobytes())


def stored(n, seed, dtype=torch.bfloat16):
    """A chunk as a store holds it: K, then V, zeros up to a multiple of 4,096."""
    random = torch.Generator().manual_seed(seed)
    kv = torch.randn(LAYERS, 2, HEADS, n, DIM, generator=random).to(dtype)
    length = kv[0].numel() * kv.element_size()
    segments = np.zeros((LAYERS, -(-length // 4096) * 4096), np.uint8)
    segments[:, :length] = kv.view(LAYERS, -1).view(torch.uint8).numpy()
    lay = torch.from_numpy(segments).view(dtype)[:, : kv[0].numel()].view(kv.shape)
    return StoredKV(segments, lay[:, 0], lay[:, 1], length, checksums(segments))


def checksums(segments):
    return np.array([xxhash.xxh3_64_intdigest(s.tobytes()) for s in segments], np.uint64)


def prompt(dtype=torch.bfloat16):
    """Chunks by their numbers, each with its place; the positions, and tables for them."""
    chunks, at = {}, 3
    for number, n in SIZES.items():
        chunks[number] = (stored(n, seed=number, dtype=dtype), at)
        at += n
    random = torch.Generator().manual_seed(99)
    return chunks, at, tuple(torch.randn(at + 2, DIM, generator=random) for _ in range(2))


def caches(capacity):
    return torch.full((HEADS, capacity, DIM), 7.0), torch.full((HEADS, capacity, DIM), 8.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("threads", [1, 2])
def test_sound_chunks_land_where_put_chunks_has_them(native, threads, dtype):
    chunks, end, tables = prompt(dtype)
    whole = StoredChunks(native, chunks)
    assert whole.end == end
    assert all(number in whole for number in SIZES)
    assert 1 not in whole
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for layer in range(LAYERS):
            for wanted in ([4, 0, 9], [9], [0, 4], []):
                expected, found = caches(end), caches(end)
                put = [(x.k[layer], x.v[layer], at) for x, at in (chunks[i] for i in wanted)]
                put_chunks(native, put, tables, *expected)
                assert whole.put(layer, wanted, tables, *found) == []
                assert all(map(torch.equal, found, expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("at", ["first", "v", "filled", "padding", "last"])
def test_one_flipped_bit_is_found_and_nothing_of_its_segment_is_written(native, layer, at):
    chunks, end, tables = prompt()
    kv, start = chunks[0]
    places = {"first": 0, "v": kv.length // 2, "filled": kv.length - 1, "padding": kv.length}
    kv.segments[layer, places.get(at, -1)] ^= 1
    whole = StoredChunks(native, chunks)
    for other in range(LAYERS):
        k, v = caches(end)
        assert whole.put(other, [4, 0, 9], tables, k, v) == ([0] if other == layer else [])
        here = slice(start, start + kv.k.shape[2])
        written = bool((k[:, here] != 7).any() or (v[:, here] != 8).any())
        assert written == (other != layer)
        assert bool((k[:, 3:start] != 7).any())


def test_padding_must_be_zero_even_where_the_checksum_fits(native):
    chunks, end, tables = prompt()
    kv, _ = chunks[9]
    kv.segments[1, -1] = 1
    chunks[9] = (kv._replace(checksums=checksums(kv.segments)), chunks[9][1])
    whole = StoredChunks(native, chunks)
    assert [whole.put(i, [9], tables, *caches(end)) for i in range(LAYERS)] == [[], [9], []]


def test_what_does_not_fit_is_refused(native):
    chunks, end, tables = prompt()
    kv, start = chunks[4]
    other = stored(7, seed=4)
    for wrong in (
        kv._replace(k=other.k),  # elsewhere
        kv._replace(v=kv.v[:2]),
        kv._replace(length=kv.length - 1),
        kv._replace(length=kv.segments.shape[1] + 1),
        kv._replace(checksums=kv.checksums[:2]),
        kv._replace(checksums=kv.checksums.astype(np.int64)),
        kv._replace(segments=kv.segments[:, ::2]),
        kv._replace(segments=kv.segments[0]),
        kv._replace(k=kv.k.double(), v=kv.v.double()),
    ):
        with pytest.raises(ValueError, match=r"must|lie|are|need"):
            StoredChunks(native, {4: (wrong, start)})
    with pytest.raises(ValueError, match="cannot start at -1"):
        StoredChunks(native, {4: (kv, -1)})
    whole = StoredChunks(native, chunks)
    with pytest.raises(ValueError, match="exceed"):
        whole.put(0, [9], tables, *caches(end - 1))
    with pytest.raises(ValueError, match="layer 3"):
        whole.put(3, [9], tables, *caches(end))
    with pytest.raises(ValueError, match="does not fit"):
        whole.put(0, [9], None, *(torch.zeros(HEADS + 1, end, DIM) for _ in range(2)))
