"""Random use of a store of two small tiers, against a dict.

What may never happen: a value other than the last one put, a tier above its limit, books that
differ from the tier, an evicted block that was pinned, a protected block without its durable copy.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrag.store.disk import DiskTier
from kvrag.store.ram import RamTier
from kvrag.store.tiered import TieredStore, TierSlot

from .helpers import FINGERPRINT, make_block, make_key, token_ids

PAGE = 4096
RAM_LIMIT = 7 * PAGE
DISK_LIMIT = 14 * PAGE

names = st.integers(0, 4)
# One or three pages a segment; the versions of a block differ in size and in bytes.
versions = st.integers(0, 3)


def block_of(name, version):
    return make_block(name, version=version, segment_nbytes=(100, 9000)[version % 2])


class StoreMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="kvrag-store-"))
        self.put_last = {}  # name -> versions that may be answered: the last put, and what it left
        self.durable = set()  # protected names whose last put was durable
        self.protected = set()
        self.readers = []
        self.start()

    def start(self):
        self.ram, self.disk = RamTier(), DiskTier(self.root)
        slots = [TierSlot(self.ram, RAM_LIMIT), TierSlot(self.disk, DISK_LIMIT)]
        self.store = TieredStore(slots)
        self.store.protect([make_key(name) for name in self.protected])

    def open(self, name):
        return self.store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))

    @initialize(first=st.lists(st.tuples(names, versions), min_size=3, max_size=6))
    def fill(self, first):
        for name, version in first:
            self.put(name, version, protected=False)

    @rule(name=names, version=versions, protected=st.booleans())
    def put(self, name, version, protected):
        self.close_readers_of(name)
        outcome = self.store.put(make_key(name), block_of(name, version), protected=protected)
        if protected:
            self.protected.add(name)
        held_before = self.put_last.get(name, set())
        if outcome.durable:
            self.put_last[name] = {version}
            if name in self.protected:
                self.durable.add(name)
        else:  # the older durable copy stays, if there is one
            self.put_last[name] = held_before | {version}

    @rule(name=names)
    def read(self, name):
        reader = self.open(name)
        if reader is None:
            assert name not in self.durable
            return
        with reader:
            self.check(name, reader.read(0, 1) + reader.read(1, 2))

    def check(self, name, segments):
        known = [list(block_of(name, version).segments) for version in self.put_last[name]]
        assert segments in known

    @precondition(lambda self: len(self.readers) < 2)
    @rule(name=names)
    def open_and_hold(self, name):
        reader = self.open(name)
        if reader is not None:
            self.readers.append((name, reader, reader.tier, reader.header))

    @precondition(lambda self: self.readers)
    @rule(all_of_it=st.booleans())
    def read_held(self, all_of_it):
        name, reader, _, header = self.readers[0]
        segments = reader.read(0, 2 if all_of_it else 1)
        assert reader.header == header
        known = [block_of(name, version) for version in range(4)]
        (block,) = (block for block in known if block.header == header)
        assert segments == list(block.segments[: len(segments)])

    @precondition(lambda self: self.readers)
    @rule()
    def close_held(self):
        self.readers.pop(0)[1].close()

    def close_readers_of(self, name):
        """What is put again or deleted under a reader may end it: that is tested elsewhere."""
        for entry in [entry for entry in self.readers if entry[0] == name]:
            entry[1].close()
            self.readers.remove(entry)

    @rule(name=names)
    def delete(self, name):
        held = self.store.contains(make_key(name))
        self.close_readers_of(name)
        assert self.store.delete(make_key(name)) == held
        assert self.open(name) is None
        self.put_last.pop(name, None)
        self.durable.discard(name)

    @rule(name=names)
    def protect(self, name):
        self.store.protect([make_key(name)])
        self.protected.add(name)
        if self.disk.contains(make_key(name)):
            self.durable.add(name)

    @rule(name=names)
    def unprotect(self, name):
        self.store.unprotect([make_key(name)])
        self.protected.discard(name)
        self.durable.discard(name)

    @rule(name=names)
    def lose_the_copy_in_memory(self, name):
        self.close_readers_of(name)
        self.ram.delete(make_key(name))
        assert self.open_and_close(name) or name not in self.durable

    def open_and_close(self, name):
        reader = self.open(name)
        if reader is not None:
            reader.close()
        return reader is not None

    @rule()
    def restart(self):
        for _, reader, *_ in self.readers:
            reader.close()
        self.readers.clear()
        self.store.close()
        self.start()

    @rule(some=st.lists(names, max_size=6))
    def locate(self, some):
        keys = [make_key(name) for name in some]
        places = self.store.locate(keys)
        assert len(places) == len(keys)
        for key, place in zip(keys, places, strict=True):
            if place is None:
                assert not self.ram.contains(key)
                assert not self.disk.contains(key)

    @invariant()
    def bytes_are_the_sum_and_within_the_limit(self):
        for stats, tier in zip(self.store.stats().tiers, (self.ram, self.disk), strict=True):
            held = tier.entries()
            assert stats.nbytes == tier.nbytes == sum(entry.nbytes for entry in held)
            assert stats.blocks == len(held)
            assert stats.nbytes <= stats.limit_bytes
            assert stats.damaged == stats.errors == 0

    @invariant()
    def protected_blocks_are_durable(self):
        for name in self.durable:
            assert self.disk.contains(make_key(name)), f"{name} is lost"

    @invariant()
    def pinned_blocks_stay(self):
        for name, reader, tier, _ in self.readers:
            assert reader.tier == tier
            held = self.ram if tier == "ram" else self.disk
            assert held.contains(make_key(name)), f"{name} was evicted under its reader"

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.root)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
