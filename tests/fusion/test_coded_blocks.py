"""Coded blocks from memory and from disk: placed as they are stored, or decoded before."""

from __future__ import annotations

import pytest
import torch

from kvrag.fusion import create
from kvrag.fusion.stream import BlockStream
from kvrag.kernels.native import load, put_stored
from kvrag.store.codecs import codec
from kvrag.store.disk import DiskTier
from kvrag.store.ram import RamTier
from tests.fusion.checks import check_released, check_same_cache
from tests.fusion.rooms import CHUNKS, Room
from tests.fusion.test_resident import PLACES, flip

LAYERS = 4


@pytest.fixture
def native_dir(pytestconfig):
    folder = pytestconfig.cache.mkdir("kvrag-kernels")
    if load(folder) is None:
        pytest.skip("native code cannot be compiled here")
    return folder


@pytest.fixture(params=["ram", "disk"])
def tier(request, tmp_path):
    return RamTier() if request.param == "ram" else DiskTier(tmp_path / "kv")


def made_room(tiny, tier, native_dir, name):
    room = Room(tiny("llama"), dtype=torch.bfloat16, tier=tier, kernels_dir=native_dir, codec=name)
    room.add(*CHUNKS)
    return room


@pytest.mark.parametrize("name", ["raw", "int8", "int4"])
@pytest.mark.parametrize("strategy", ["reuse", "cacheblend", "fast"])
def test_placing_what_is_stored_changes_no_bit(tiny, tier, native_dir, name, strategy, monkeypatch):
    """Against streams that decode first, and then place."""
    room = made_room(tiny, tier, native_dir, name)
    placed = []

    def noting(native, layer, chunks, *args):
        placed.append((layer, len(chunks)))
        return put_stored(native, layer, chunks, *args)

    monkeypatch.setattr("kvrag.models.layer.put_stored", noting)
    found = room.run(CHUNKS, create(strategy))
    assert sum(count for _, count in placed) == LAYERS * len(CHUNKS)
    assert found.tiers == (tier.name,) * 3
    monkeypatch.setattr(BlockStream, "place_layer", lambda self, place: self.next_layer())
    expected = room.run(CHUNKS, create(strategy))
    assert torch.equal(found.logits, expected.logits)
    check_same_cache(found, expected)
    check_released(room)


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_bit_that_flips_in_memory_is_found(tiny, native_dir, name, layer, place):
    """Its chunk is computed; the others are used."""
    room = made_room(tiny, RamTier(), native_dir, name)
    expected = room.run(CHUNKS, create("reuse"))
    flip(room, CHUNKS[1], layer, place)
    found = room.run(CHUNKS, create("reuse"))
    assert found.tiers == ("ram", "computed", "ram")
    assert torch.equal(found.logits, expected.logits)
    check_same_cache(found, expected)
    assert room.run(CHUNKS, create("reuse")).tiers == ("ram",) * 3
    check_released(room)


def test_coded_layers_wait_as_they_are_stored(tiny, tmp_path, native_dir):
    """Which is less, so that more of them may be read ahead; and no thread reads memory."""
    room = made_room(tiny, DiskTier(tmp_path / "kv"), native_dir, "int4")
    sizes = {}
    for placing in (True, False):
        readers = [room.blocks.open(chunk) for chunk in CHUNKS]
        stream = BlockStream(
            readers, room.blocks.codec, pytest.fail, [0] * LAYERS, placing=placing, ahead_bytes=0
        )
        sizes[placing] = [chunk.layer_nbytes for chunk in stream._chunks.values()]
        # Who asks for numbers gets them.
        layers = [stream.next_layer() for _ in range(LAYERS)]
        assert all(k.dtype is torch.bfloat16 for layer in layers for k, _ in layer)
        stream.close()
    assert sizes[True] == [4096] * 3
    itemsize, heads, dim = 2, *layers[0][0][0].shape[::2]
    assert sizes[False] == [2 * itemsize * heads * len(chunk) * dim for chunk in CHUNKS]
    check_released(room)
    assert codec("int4").layout(readers[0].header).bits == 4
