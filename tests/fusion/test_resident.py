"""Blocks in memory: verified where they are used, and as sound as those from any other tier."""

from __future__ import annotations

import threading

import pytest
import torch

from kvrag.fusion import create
from kvrag.fusion.base import PlacingStream
from kvrag.fusion.stream import BlockStream
from kvrag.kernels.native import load
from kvrag.store.codecs import codec
from kvrag.store.ram import RamTier, _Held
from tests.fusion.checks import check_released, check_same_cache
from tests.fusion.rooms import CHUNKS, QUESTION, Room

LAYERS = 4
#: Where in a segment a bit flips: in K, in V, in the padding.
PLACES = {"K": 5, "V": -5, "padding": None}


@pytest.fixture(params=["native", "torch"])
def room(request, tiny, pytestconfig):
    """A room whose only tier is memory, with its blocks in it; each with and without native code,
    which verifies and places in one call."""
    folder = None
    if request.param == "native":
        folder = pytestconfig.cache.mkdir("kvrag-kernels")
        if load(folder) is None:
            pytest.skip("native code cannot be compiled here")
    room = Room(tiny("llama"), dtype=torch.bfloat16, tier=RamTier(), kernels_dir=folder)
    assert (room.model.decoder.kernels.native is None) == (request.param == "torch")
    room.add(*CHUNKS)
    return room


def flip(room, chunk, layer, place):
    """Flip one bit of a segment that lies in memory, wherever readers have it from."""
    (slot,) = room.store._placement.slots
    key = room.blocks.key(chunk)
    held = slot.tier._held[key]
    segment = held.header.segments[layer]
    assert segment.length < segment.padded_nbytes
    at = {"K": segment.offset + 5, "V": segment.offset + segment.length - 5}.get(
        place, segment.end - 1
    )
    data = bytearray(held.data)
    data[at] ^= 0x10
    slot.tier._held[key] = _Held(memoryview(bytes(data)), held.header)


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", ["reuse", "cacheblend", "fast"])
def test_a_bit_that_flips_between_two_requests_is_found(room, name, layer, place):
    """The same answer; that chunk alone is computed, and quarantined, and sound afterwards."""
    strategy = create(name)
    expected = room.run(CHUNKS, strategy)
    assert expected.tiers == ("ram",) * 3
    flip(room, CHUNKS[1], layer, place)
    found = room.run(CHUNKS, strategy)
    assert torch.equal(found.logits, expected.logits)
    check_same_cache(found, expected)
    assert found.tiers == ("ram", "computed", "ram")
    assert found.tokens.computed == len(QUESTION) + len(CHUNKS[1])
    (tier,) = room.store.stats().tiers
    assert (tier.damaged, tier.errors) == (1, 0)
    assert room.run(CHUNKS, strategy).tiers == ("ram",) * 3
    check_released(room)


def test_damage_of_several_chunks_in_different_layers(room):
    expected = room.run(CHUNKS, create("reuse"))
    for chunk, layer in zip(CHUNKS, (3, 0, 3), strict=True):
        flip(room, chunk, layer, "V")
    found = room.run(CHUNKS, create("reuse"))
    assert torch.equal(found.logits, expected.logits)
    check_same_cache(found, expected)
    assert found.tiers == ("computed",) * 3
    check_released(room)


def test_a_bit_that_flips_amid_a_run_is_found(room):
    """The stream has the memory in hand, and has used the layers before."""
    readers = [room.blocks.open(chunk) for chunk in CHUNKS]
    recomputed = []

    def recompute(chunk):
        recomputed.append(chunk)
        return room.blocks.layers(room.blocks.compute(CHUNKS[chunk]))

    stream = BlockStream(readers, codec("raw"), recompute, [0] * LAYERS)
    before = [stream.next_layer() for _ in range(2)]
    resident = stream._resident[2]._resident
    data = bytearray(resident.data)
    data[resident.header.segments[2].offset - resident.header.header_nbytes + 9] ^= 1
    resident.data = memoryview(bytes(data))
    flip(room, CHUNKS[2], 2, "K")
    after = [stream.next_layer() for _ in range(2)]
    stream.close()
    assert recomputed == [2]
    for layer, chunks in enumerate((*before, *after)):
        for chunk, kv in zip(CHUNKS, chunks, strict=True):
            expected = room.blocks.layers(room.blocks.compute(chunk))[layer]
            assert all(map(torch.equal, kv, expected))
    check_released(room)


def test_memory_that_errs_once_costs_no_block(room):
    """A second look finds it sound: it is read like from any tier, and stays."""
    readers = [room.blocks.open(chunk) for chunk in CHUNKS]
    stream = BlockStream(readers, codec("raw"), pytest.fail, [0] * LAYERS)
    resident = stream._resident[0]._resident
    resident.data = memoryview(bytes(len(resident.data)))
    layers = [stream.next_layer() for _ in range(LAYERS)]
    stream.close()
    expected = room.blocks.layers(room.blocks.compute(CHUNKS[0]))
    for layer in range(LAYERS):
        assert all(map(torch.equal, layers[layer][0], expected[layer]))
    (tier,) = room.store.stats().tiers
    assert tier.damaged == 0
    check_released(room)


def test_memory_takes_no_thread_and_is_counted(room):
    room.run(CHUNKS, create("reuse"))
    before = room.store.stats().tiers[0].bytes_read
    found = room.run(CHUNKS, create("reuse"))
    assert not [t for t in threading.enumerate() if t.name.startswith("kvrag-io")]
    nbytes = 0
    for chunk in CHUNKS:
        with room.blocks.open(chunk) as reader:
            nbytes += sum(segment.padded_nbytes for segment in reader.header.segments)
    assert room.store.stats().tiers[0].bytes_read - before == nbytes
    assert found.measured["ram"].nbytes == nbytes
    assert 0 < found.measured["ram"].seconds == found.load_s
    assert found.stall_s < found.load_s


def test_a_block_is_let_go_when_its_last_layer_was_used(room):
    """Its memory may be wanted, and a run may go on for long."""
    readers = [room.blocks.open(chunk) for chunk in CHUNKS]
    stream = BlockStream(readers, codec("raw"), pytest.fail, [0, 0, 1, 1])
    assert isinstance(stream, PlacingStream)
    for _ in range(2):
        stream.next_layer()
    assert room.store.stats().open_blocks == 2
    stream.close()
    assert room.store.stats().open_blocks == 0


def test_a_block_put_again_amid_a_run_changes_nothing(room):
    """Readers keep what they opened."""
    readers = [room.blocks.open(chunk) for chunk in CHUNKS]
    stream = BlockStream(readers, codec("raw"), pytest.fail, [0] * LAYERS)
    layers = [stream.next_layer()]
    room.add(*CHUNKS)
    room.store.delete(room.blocks.key(CHUNKS[1]))
    layers += [stream.next_layer() for _ in range(LAYERS - 1)]
    stream.close()
    for chunk, own in zip(CHUNKS, zip(*layers, strict=True), strict=True):
        expected = room.blocks.layers(room.blocks.compute(chunk))
        assert all(
            map(torch.equal, (x for kv in own for x in kv), (x for kv in expected for x in kv))
        )
