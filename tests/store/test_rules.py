"""What a tier takes, keeps and gives up by its rules: quotas, shares, time to live, second use."""

from __future__ import annotations

import os
import time

import pytest

from kvrag.store.admission import SecondUse
from kvrag.store.disk import DiskTier
from kvrag.store.eviction import POLICIES, policy_named
from kvrag.store.ledger import Ledger
from kvrag.store.ram import RamTier
from kvrag.store.stats import LATENCY_BOUNDS_S, LatencyCounter
from kvrag.store.tiered import Limits, TieredStore, TierSlot

from .doubles import FakeClock, SlowTier
from .helpers import FINGERPRINT, make_block, make_key, token_ids

SIZE = make_block(0).nbytes
MINE, OTHER = "a" * 32, "b" * 32


def put(store, name, tag=MINE, **options):
    return store.put(make_key(name, tag), make_block(name, tag=tag), **options)


def read(store, name, tag=MINE):
    """The tier it was read from, or None for a miss."""
    reader = store.open(make_key(name, tag), fingerprint=FINGERPRINT, token_ids=token_ids(name))
    if reader is None:
        return None
    with reader:
        assert reader.read(0, 2) == list(make_block(name, tag=tag).segments)
        return reader.tier


def names(tier, tag=MINE):
    return {name for name in range(20) if tier.contains(make_key(name, tag))}


def of(store, name):
    return next(tier for tier in store.stats().tiers if tier.name == name)


@pytest.mark.parametrize(
    "wrong",
    [{"nbytes": -1}, {"namespace_nbytes": -1}, {"ttl_s": -1}, {"reserved_share": 1.1}],
)
def test_limits_that_are_none(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


def test_rules_that_are_none():
    with pytest.raises(ValueError, match="admission of ram must be one of always, second-use"):
        TierSlot(RamTier(), admission="twice")
    with pytest.raises(ValueError, match="write of disk must be"):
        TierSlot(SlowTier("disk"), write="never")
    with pytest.raises(ValueError, match="ram is memory"):
        TierSlot(RamTier(), write="back")


# -- quotas and shares -------------------------------------------------------------------------


def test_a_quota_is_kept_by_giving_up_ones_own():
    slow = SlowTier()
    limits = Limits(10 * SIZE, namespace_nbytes=2 * SIZE)
    with TieredStore([TierSlot(slow, limits)]) as store:
        put(store, 0, OTHER)
        for name in range(4):
            assert put(store, name).durable
        assert names(slow) == {2, 3}
        assert names(slow, OTHER) == {0}


def test_a_full_quota_is_a_refusal_that_the_outcome_names():
    slow = SlowTier()
    with TieredStore([TierSlot(slow, Limits(None, namespace_nbytes=2 * SIZE))]) as store:
        for name in range(2):
            put(store, name, protected=True)
        put(store, 0, OTHER)
        outcome = put(store, 2)
        assert outcome.tiers == ()
        assert outcome.lost
        ((tier, reason),) = outcome.refused
        assert tier == "slow"
        assert f"quota of {2 * SIZE}" in reason
        assert names(slow) == {0, 1}
        assert names(slow, OTHER) == {0}
        assert of(store, "slow").refused == 1


def test_what_passes_leaves_a_corpus_its_share():
    ram = RamTier()
    limits = Limits(4 * SIZE, reserved_share=0.5)
    with TieredStore([TierSlot(ram, limits), TierSlot(SlowTier())]) as store:
        for name in range(3):
            put(store, name, protected=True)
        for name in range(10, 16):
            put(store, name)
        # One block of the corpus went with the rest of its age; two are its share.
        assert names(ram) == {1, 2, 14, 15}
        for name in range(3, 9):
            put(store, name, protected=True)
        assert names(ram) == {5, 6, 7, 8}


def test_without_a_share_everyone_competes():
    ram = RamTier()
    with TieredStore([TierSlot(ram, 4 * SIZE), TierSlot(SlowTier())]) as store:
        put(store, 0, protected=True)
        for name in range(10, 14):
            put(store, name)
        assert names(ram) == {10, 11, 12, 13}


# -- time to live ------------------------------------------------------------------------------


def test_what_nobody_used_for_its_time_is_a_miss_and_gone():
    clock, ram, slow = FakeClock(), RamTier(), SlowTier()
    slots = [TierSlot(ram, Limits(ttl_s=10)), TierSlot(slow, Limits(ttl_s=100))]
    with TieredStore(slots, clock=clock) as store:
        put(store, 0)
        put(store, 1, protected=True)
        clock.now += 8
        assert read(store, 0) == "ram"  # a use begins its time anew
        clock.now += 8
        assert read(store, 0) == "ram"
        clock.now += 12
        assert read(store, 0) == "slow"  # and it is promoted again
        assert of(store, "ram").expired == 1
        clock.now += 102
        assert read(store, 0) is None
        assert (names(ram), names(slow)) == ({1}, {1})  # a corpus's blocks stay
        assert read(store, 1) == "ram"


def test_what_is_open_does_not_expire():
    clock, slow = FakeClock(), SlowTier()
    with TieredStore([TierSlot(slow, Limits(ttl_s=10))], clock=clock) as store:
        put(store, 0)
        reader = store.open(make_key(0), fingerprint=FINGERPRINT, token_ids=token_ids(0))
        clock.now += 60
        assert read(store, 0) == "slow"
        assert reader.read(0, 2) == list(make_block(0).segments)
        reader.close()


def test_puts_sweep_what_nobody_asks_for():
    clock, slow = FakeClock(), SlowTier()
    with TieredStore([TierSlot(slow, Limits(ttl_s=10))], clock=clock) as store:
        for name in range(5):
            put(store, name)
        clock.now += 11
        put(store, 9)
        assert names(slow) == {9}
        assert of(store, "slow").nbytes == SIZE


@pytest.mark.parametrize("policy", list(POLICIES))
def test_puts_sweep_what_lies_behind_blocks_that_are_used(policy):
    """S3-FIFO leaves what is used at its place: sixteen such blocks hid all that came after."""
    clock, ram = FakeClock(), RamTier()
    slots = [TierSlot(ram, Limits(ttl_s=60), policy=policy_named(policy))]
    with TieredStore(slots, clock=clock) as store:
        for name in range(40):
            put(store, name)
        for _ in range(5):
            clock.now += 50
            for name in range(16):
                assert read(store, name) == "ram"
            put(store, "new")
        assert names(ram) == set(range(16))


def test_a_sweep_looks_at_a_bounded_number_and_goes_round():
    clock = FakeClock()
    ledger = Ledger(Limits(ttl_s=10), clock=clock)
    ledger.load((make_key(name), 1, 0.0) for name in range(3000))
    clock.now += 11
    for name in range(2900):
        ledger.touch(make_key(name))
    for _ in range(2):
        found = [key for _ in range(3) for key in ledger.idle(100)]
        assert sorted(found) == sorted(make_key(name) for name in range(2900, 3000))
    for _ in range(2):
        assert ledger.idle(100) == []  # further from the end than one call goes
    assert len(ledger.idle(60)) == 60
    assert len(ledger.idle(60)) == 40


def test_the_time_goes_on_over_a_restart(tmp_path):
    limits = Limits(ttl_s=86_400)
    with TieredStore([TierSlot(DiskTier(tmp_path), limits)]) as store:
        put(store, 0)
        put(store, 1)
    (old,) = tmp_path.rglob(f"{make_key(0).digest}.kv")
    then = time.time() - 90_000
    os.utime(old, (then, then))
    with TieredStore([TierSlot(DiskTier(tmp_path), limits)]) as store:
        assert read(store, 0) is None
        assert not old.exists()
        assert read(store, 1) == "disk"


def test_what_another_process_uses_does_not_end(tmp_path):
    """Each process knew of its own uses alone: one deleted what the other had used just now."""
    limits, clock = Limits(ttl_s=600), FakeClock()
    with (
        TieredStore([TierSlot(DiskTier(tmp_path), limits)]) as one,
        TieredStore([TierSlot(DiskTier(tmp_path), limits)], clock=clock) as other,
    ):
        for name in range(3):
            put(other, name)
        paths = [next(tmp_path.rglob(f"{make_key(name).digest}.kv")) for name in range(3)]
        now = time.time()
        for path in paths:
            os.utime(path, (now - 590, now - 590))
        assert read(one, 0) == "disk"  # a use, ten seconds before its time is over
        os.utime(paths[1], (now - 700, now - 700))
        clock.now += 601
        put(other, 9)
        assert [path.exists() for path in paths] == [True, False, True]
        clock.now += 5
        put(other, 9)
        assert paths[2].exists()  # used ten seconds before its end, as the disk says
        os.utime(paths[2], (now - 700, now - 700))
        clock.now += 6
        assert read(other, 2) is None
        assert not paths[2].exists()
        clock.now += 580
        assert read(other, 0) == "disk"


# -- second use --------------------------------------------------------------------------------


def test_a_second_use_admits():
    ram, slow = RamTier(), SlowTier()
    slots = [TierSlot(ram, admission="second-use"), TierSlot(slow)]
    with TieredStore(slots) as store:
        outcome = put(store, 0)
        assert outcome.tiers == ("slow",)
        assert (outcome.deferred, outcome.refused) == (("ram",), ())
        assert of(store, "ram").refused == 0
        assert read(store, 0) == "slow"
        assert read(store, 0) == "ram"


def test_a_scan_does_not_reach_memory():
    ram, slow = RamTier(), SlowTier()
    slots = [TierSlot(ram, 2 * SIZE, admission="second-use"), TierSlot(slow)]
    with TieredStore(slots) as store:
        for _ in range(2):
            put(store, 0)
        for name in range(1, 20):
            put(store, name)
        assert names(ram) == {0}


def test_a_durable_tier_takes_a_corpus_at_once():
    slow = SlowTier()
    with TieredStore([TierSlot(RamTier()), TierSlot(slow, admission="second-use")]) as store:
        outcome = put(store, 0)
        assert (outcome.durable, outcome.deferred, outcome.lost) == (False, ("slow",), False)
        assert put(store, 1, protected=True).durable
        assert put(store, 0).durable


def test_second_use_forgets_in_the_end():
    seen = SecondUse(most=100)
    assert not seen.again(make_key("x"))
    assert seen.again(make_key("x"))
    for name in range(200):
        seen.again(make_key(name))
    assert not seen.again(make_key("x"))


# -- counters ----------------------------------------------------------------------------------


def test_latencies_of_each_operation():
    with TieredStore([TierSlot(RamTier()), TierSlot(SlowTier())]) as store:
        put(store, 0)
        read(store, 0)
        ram, slow = store.stats().tiers
    assert (ram.write_latency.count, ram.read_latency.count) == (1, 1)
    assert ram.lookup_latency.count == 1
    assert (slow.write_latency.count, slow.read_latency.count) == (1, 0)
    assert 0 < ram.write_latency.sum_s < 10


def test_a_latency_counts_in_the_bucket_that_it_does_not_exceed():
    counter = LatencyCounter()
    for seconds in (1e-6, 16e-6, 20e-6, 99):
        counter.add(seconds)
    latency = counter.read()
    assert LATENCY_BOUNDS_S[:2] == (16e-6, 32e-6)
    assert latency.counts == (2, 1, *[0] * 19, 1)
    assert latency.sum_s == pytest.approx(99.000037)
