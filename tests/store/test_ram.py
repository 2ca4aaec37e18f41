from __future__ import annotations

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
