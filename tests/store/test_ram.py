from __future__ import annotations

import pytest

from kvrag.store.errors import BlockFormatError
from kvrag.store.ram import RamTier, _Held

from .contract import TierContract
from .helpers import make_block, make_key


class TestRamTier(TierContract):
    def make(self, folder):
        return RamTier()

    def raw_write(self, tier, key, data):
        tier._held[key] = _Held(memoryview(data))

    def raw_read(self, tier, key):
        held = tier._held.get(key)
        return None if held is None else bytes(held.data)

    def test_entries_are_in_the_order_of_their_puts(self, tier):
        for name in (2, 0, 1, 0):
            tier.put(make_key(name), make_block(name))
        assert [entry.key for entry in tier.entries()] == [make_key(name) for name in (2, 1, 0)]

    def test_it_is_not_durable(self, tier):
        assert not tier.durable

    @pytest.mark.parametrize("place", [0, 9, 17, 30, 4000])
    def test_a_bit_that_changes_in_a_kept_header_is_found(self, tier, place):
        tier.put(make_key(1), make_block(1))
        assert tier.header(make_key(1)) == make_block(1).header
        held = tier._held[make_key(1)]
        data = bytearray(held.data)
        data[place] ^= 4
        tier._held[make_key(1)] = _Held(memoryview(data), held.header)
        with pytest.raises(BlockFormatError):
            tier.header(make_key(1))
