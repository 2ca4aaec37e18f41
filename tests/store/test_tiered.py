from __future__ import annotations

import contextlib
import logging
import threading
import time

import pytest

from kvrag.store.disk import DiskTier
from kvrag.store.errors import DamagedBlockError, StoreError, TierError, TierFullError
from kvrag.store.health import Health
from kvrag.store.ram import RamTier, _Held
from kvrag.store.tiered import Expected, TieredStore, TierSlot, at_once

from .doubles import FakeClock, SlowTier, in_threads
from .helpers import FINGERPRINT, make_block, make_key, token_ids, whole_bytes

SIZE = make_block(0).nbytes  # of every block here, unless it says otherwise


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def ram():
    return RamTier()


@pytest.fixture
def slow():
    return SlowTier()


@pytest.fixture
def store(ram, slow, clock):
    with TieredStore(
        [TierSlot(ram, 4 * SIZE), TierSlot(slow)], clock=clock, aside=at_once
    ) as store:
        yield store


def open_block(store, name, **changes):
    expected = {"fingerprint": FINGERPRINT, "token_ids": token_ids(name)}
    return store.open(make_key(name), **(expected | changes))


def wanted(names):
    return [Expected(make_key(n), "chunk", FINGERPRINT, token_ids(n)) for n in names]


def put(store, name, **options):
    return store.put(make_key(name), make_block(name), **options)


def damage(tier, name, position=4096 + 7):
    data = bytearray(tier._held[make_key(name)].data)
    data[position] ^= 1
    tier._held[make_key(name)] = _Held(memoryview(bytes(data)))


def of(store, name):
    return next(tier for tier in store.stats().tiers if tier.name == name)


# -- put and open ------------------------------------------------------------------------------


def test_put_goes_to_every_tier(store, ram, slow):
    outcome = put(store, 1)
    assert outcome.tiers == ("ram", "slow")
    assert outcome.durable
    assert outcome.refused == ()
    assert ram.contains(make_key(1))
    assert slow.contains(make_key(1))


def test_a_block_comes_back(store):
    put(store, 1)
    with open_block(store, 1) as reader:
        assert reader.header == make_block(1).header
        assert reader.tier == "ram"
        assert reader.read(0, 2) == list(make_block(1).segments)
        assert reader.read(1, 2) == [make_block(1).segments[1]]
        assert all(view.readonly for view in reader.read(0, 2))


def test_a_miss_is_none(store):
    assert open_block(store, 1) is None
    assert not store.contains(make_key(1))
    assert (of(store, "ram").misses, of(store, "slow").misses) == (1, 1)
    assert store.stats().open_blocks == 0


def test_put_of_another_key_is_refused(store):
    with pytest.raises(ValueError, match="cannot be put as"):
        store.put(make_key(2), make_block(1))


def test_locate_lines_up(store, ram):
    put(store, 1)
    put(store, 3)
    ram.delete(make_key(3))
    keys = [make_key(name) for name in (0, 1, 2, 3, 1)]
    assert store.locate(keys) == [None, "ram", None, "slow", "ram"]
    assert store.locate([]) == []


def test_holds_durably(store, ram, slow):
    assert not store.holds_durably(make_key(1))
    put(store, 1)
    assert store.holds_durably(make_key(1))
    slow.delete(make_key(1))
    assert store.contains(make_key(1))
    assert not store.holds_durably(make_key(1))
    slow.down = True
    assert not store.holds_durably(make_key(1))


def test_keys_of_all_tiers_once(store, ram):
    put(store, 1)
    put(store, 2)
    ram.delete(make_key(2))
    other = make_key(3, "b" * 32)
    store.put(other, make_block(3, tag="b" * 32))
    assert set(store.keys()) == {make_key(1), make_key(2), other}
    assert list(store.keys("b" * 32)) == [other]
    assert len(list(store.keys())) == 3


def test_delete_from_all_tiers(store, ram, slow):
    put(store, 1)
    assert store.delete(make_key(1))
    assert not store.delete(make_key(1))
    assert not ram.contains(make_key(1))
    assert not slow.contains(make_key(1))
    assert [tier.nbytes for tier in store.stats().tiers] == [0, 0]


def test_what_is_protected_again_is_not_deleted_with_the_rest(store, ram, slow):
    for name in range(200):
        put(store, name)
    store.protect([make_key(7)])
    store.delete_unprotected([make_key(name) for name in range(200)])
    assert list(store.keys()) == [make_key(7)]
    assert [of(store, "ram").blocks, of(store, "slow").blocks] == [0, 1]
    slow.down = True
    with pytest.raises(TierError, match="no route"):
        store.delete_unprotected([make_key(name) for name in range(200, 400)])


def test_a_range_outside_the_block_is_refused(store):
    put(store, 1)
    with open_block(store, 1) as reader:
        for first, last in ((0, 3), (-1, 1), (1, 1), (2, 1)):
            with pytest.raises(ValueError, match="segments 0 to 2"):
                reader.read(first, last)


def test_tiers_need_different_names():
    for tiers in ([], [RamTier(), RamTier()]):
        with pytest.raises(ValueError, match="different names"):
            TieredStore([TierSlot(tier) for tier in tiers])
    with pytest.raises(ValueError, match="nbytes must be at least 0"):
        TierSlot(RamTier(), -1)


def test_after_close(store):
    put(store, 1)
    reader = open_block(store, 1)
    reader.read(0, 1)
    store.close()
    store.close()
    assert reader.read(0, 1) == [make_block(1).segments[0]]
    with pytest.raises(DamagedBlockError):
        reader.read(1, 2)
    reader.close()
    for use in (
        lambda: open_block(store, 1),
        lambda: put(store, 1),
        lambda: store.delete(make_key(1)),
        lambda: store.contains(make_key(1)),
        lambda: store.keys(),
    ):
        with pytest.raises(StoreError):
            use()


# -- integrity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [3, 30, 4000, 4096 + 7, 8191, 8192 + 99])
def test_a_damaged_copy_is_quarantined_and_the_next_tier_answers(store, ram, position):
    put(store, 1)
    damage(ram, 1, position)
    with open_block(store, 1) as reader:
        assert reader.read(0, 2) == list(make_block(1).segments)
        assert reader.tier == "slow"
    assert of(store, "ram").damaged == 1
    # It was read whole from the slower tier, and so it is back in the faster one.
    assert store.locate([make_key(1)]) == ["ram"]
    assert of(store, "ram").nbytes == SIZE


def test_no_sound_copy_is_a_typed_error(store, ram, slow):
    put(store, 1)
    damage(ram, 1)
    damage(slow, 1)
    with open_block(store, 1) as reader:
        with pytest.raises(DamagedBlockError, match="checksum of segment 0") as caught:
            reader.read(0, 2)
        assert (caught.value.key, caught.value.tier) == (make_key(1), "slow")
        with pytest.raises(DamagedBlockError):
            reader.read(0, 1)
        # Another one is not given the failed reader.
        assert open_block(store, 1) is None
        put(store, 1)
        with open_block(store, 1) as again:
            assert again.read(0, 2) == list(make_block(1).segments)
    assert [tier.damaged for tier in store.stats().tiers] == [1, 1]
    assert store.stats().open_blocks == 0


def test_what_was_read_before_the_damage_stays(store, ram, slow):
    put(store, 1)
    damage(ram, 1, 8192 + 1)
    damage(slow, 1, 8192 + 1)
    with open_block(store, 1) as reader:
        first = reader.read(0, 1)
        with pytest.raises(DamagedBlockError):
            reader.read(0, 2)
        assert reader.read(0, 1) == first


@pytest.mark.parametrize("position", [3, 30, 4000, 4096 + 7, 8191, 8192 + 99])
def test_a_damaged_copy_of_what_is_read_whole(ram, clock, position):
    """It is found when the block is opened, and the next tier answers."""
    near, far = SlowTier("near"), SlowTier("far")
    slots = [TierSlot(ram), TierSlot(near), TierSlot(far)]
    with TieredStore(slots, clock=clock, aside=at_once) as store:
        put(store, 1)
        ram.delete(make_key(1))
        damage(near, 1, position)
        with open_block(store, 1, whole=True) as reader:
            assert reader.tier == "far"
            assert of(store, "near").damaged == 1
            assert make_key(1) not in near._held
            assert reader.read(0, 2) == list(make_block(1).segments)
        damage(ram, 1, position)
        damage(near, 1, position)
        damage(far, 1, position)
        if position < 4096:
            assert open_block(store, 1, whole=True) is None
        else:  # memory's copy is verified as it is read
            with open_block(store, 1, whole=True) as reader, pytest.raises(DamagedBlockError):
                reader.read(0, 2)
        assert [tier.damaged for tier in store.stats().tiers] == [1, 2, 1]
        assert store.stats().open_blocks == 0
        assert not any(tier._held for tier in (ram, near, far))


def test_a_tier_that_errs_once_keeps_what_is_read_whole(store, ram, slow, monkeypatch, caplog):
    put(store, 1)
    ram.delete(make_key(1))
    segments, sound = slow.segments, []

    def erring(key, first, last):
        views = segments(key, first, last)
        if not sound:
            sound.append(True)
            return [views[0], views[0]]
        return views

    monkeypatch.setattr(slow, "segments", erring)
    assert open_block(store, 1, whole=True) is None
    assert (of(store, "slow").damaged, of(store, "slow").errors) == (0, 1)
    assert "not when read again" in caplog.text
    with open_block(store, 1, whole=True) as reader:
        assert reader.read(0, 2) == list(make_block(1).segments)


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "model-2"},
        {"token_ids": [1, 2, 3]},
        {"token_ids": []},
        {"kind": "vectors"},
    ],
)
def test_another_content_than_expected_is_never_used(store, changes):
    put(store, 1)
    assert open_block(store, 1, **changes) is None
    assert [tier.damaged for tier in store.stats().tiers] == [1, 1]
    assert open_block(store, 1) is None


def test_other_expectations_of_an_open_block_are_a_miss(store):
    put(store, 1)
    with open_block(store, 1) as reader:
        assert open_block(store, 1, fingerprint="model-2") is None
        assert reader.read(0, 2) == list(make_block(1).segments)
    assert store.stats().open_blocks == 0


def test_swapped_files_are_found(tmp_path):
    with TieredStore([TierSlot(DiskTier(tmp_path))]) as store:
        put(store, 1)
        put(store, 2)
        one, two = (
            tmp_path / "blocks" / key.tag / key.digest[:2] / f"{key.digest}.kv"
            for key in (make_key(1), make_key(2))
        )
        one.rename(tmp_path / "x")
        two.rename(one)
        (tmp_path / "x").rename(two)
        assert open_block(store, 1) is None
        assert open_block(store, 2) is None
        assert store.stats().tiers[0].damaged == 2
        assert len(list((tmp_path / "quarantine").iterdir())) == 2
        assert store.stats().tiers[0].nbytes == 0


# -- sharing -----------------------------------------------------------------------------------


def test_single_flight(store, ram, slow):
    """Ten requests for one block read each of its segments from the slow tier once."""
    put(store, 1)
    ram.delete(make_key(1))
    slow.gate = threading.Event()
    opened = threading.Barrier(11)

    def read(_):
        with open_block(store, 1) as reader:
            opened.wait(10)
            return [bytes(view) for view in reader.read(0, 1) + reader.read(1, 2)]

    gate = threading.Thread(target=lambda: (opened.wait(10), slow.gate.set()))
    gate.start()
    results = in_threads(10, read)
    gate.join()
    assert all(result == [bytes(view) for view in make_block(1).segments] for result in results)
    assert sorted(slow.reads) == [(0, 1), (1, 2)]
    assert of(store, "slow").bytes_read == 2 * 4096
    assert of(store, "slow").hits == 10


def test_what_is_read_whole_is_read_once_counted_once_and_promoted(store, ram, slow):
    put(store, 1)
    ram.delete(make_key(1))
    with open_block(store, 1, whole=True) as reader:
        assert reader.tier == "slow"
        assert slow.reads == [(0, 2)]
        slow.delete(make_key(1))  # it is here
        first = reader.fetch(1, 2)
        assert (first.read_nbytes, first.admit) == (4096, None)
        second = reader.fetch(0, 2)
        assert second.read_nbytes == 4096
        assert second.segments == list(make_block(1).segments)
        second.admit()
    assert slow.reads == [(0, 2)]
    assert of(store, "slow").bytes_read == 2 * 4096
    assert of(store, "slow").hits == 1
    assert of(store, "slow").read_latency.count == 1
    assert store.locate([make_key(1)]) == ["ram"]
    assert store.stats().open_blocks == 0


def test_what_no_books_know_is_not_read_before_its_header_is_seen(store, slow):
    slow.put(make_key(1), make_block(1))
    with open_block(store, 1, whole=True) as reader:
        assert slow.reads == []
        assert reader.read(0, 2) == list(make_block(1).segments)
    with open_block(store, 2, whole=True) or contextlib.nullcontext() as reader:
        assert reader is None


def test_opening_many_lines_up(store, ram, slow, monkeypatch):
    for name in (1, 2, 3, 4):
        put(store, name)
    ram.delete(make_key(2))
    ram.delete(make_key(4))
    damage(ram, 3, 30)
    asked = []
    headers = slow.headers
    monkeypatch.setattr(slow, "headers", lambda keys: asked.append(len(keys)) or headers(keys))
    names = (1, 9, 2, 1, 3, 4)
    other = Expected(make_key(1), "chunk", "model-2", token_ids(1))
    readers = store.open_many([*wanted(names), other])
    assert asked == [4]  # 9, 2, 3 and 4
    tiers = [reader and reader.tier for reader in readers]
    assert tiers == ["ram", None, "slow", "ram", "slow", "slow", None]
    assert store.stats().open_blocks == 4
    for name, reader in zip(names, readers, strict=False):
        if reader is not None:
            assert reader.read(0, 2) == list(make_block(name).segments)
            reader.close()
    assert store.stats().open_blocks == 0
    assert (of(store, "ram").hits, of(store, "slow").hits) == (2, 3)
    assert store.open_many([]) == []


def test_many_are_opened_by_many_at_once(store):
    """In whatever order each names them, nobody waits for one that waits for him."""
    for name in range(4):
        put(store, name)

    def use(number):
        for turn in range(50):
            names = [(number * turn + step * (1 + number % 3)) % 4 for step in range(4)]
            wanted = [Expected(make_key(n), "chunk", FINGERPRINT, token_ids(n)) for n in names]
            for name, reader in zip(names, store.open_many(wanted, whole=True), strict=True):
                with reader:
                    assert reader.read(0, 2) == list(make_block(name).segments)
        return True

    assert in_threads(6, use) == [True] * 6
    assert store.stats().open_blocks == 0


def test_what_is_held_is_not_read_again(store, ram, slow):
    key = make_key(1)
    shape = (5, 1, 3, 4)
    block = make_block(1, layers=5, k_shape=shape, v_shape=shape)
    store.put(key, block)
    ram.delete(key)
    with open_block(store, 1) as reader:
        assert reader.read(1, 2) == [block.segments[1]]
        assert reader.read(0, 4) == list(block.segments[:4])
        assert reader.read(3, 5) == list(block.segments[3:])
    assert slow.reads == [(1, 2), (0, 1), (2, 4), (4, 5)]


def test_a_held_segment_does_not_wait_for_a_read_of_others(store, ram, slow):
    put(store, 1)
    ram.delete(make_key(1))
    with open_block(store, 1) as one, open_block(store, 1) as other:
        one.read(0, 1)
        slow.gate = threading.Event()
        thread = threading.Thread(target=lambda: one.read(1, 2))
        thread.start()
        assert other.read(0, 1) == [make_block(1).segments[0]]
        slow.gate.set()
        thread.join()


def test_opening_does_not_wait_for_a_read(store, ram, slow):
    """A second request stood still until the first one's read from a slow tier was over."""
    put(store, 1)
    ram.delete(make_key(1))
    with open_block(store, 1) as one:
        slow.gate = threading.Event()
        thread = threading.Thread(target=lambda: one.read(0, 2))
        thread.start()
        assert slow.waiting.wait(10)
        with open_block(store, 1) as other:
            assert other.tier == "slow"
            slow.gate.set()
            assert other.read(0, 2) == list(make_block(1).segments)
        thread.join()
    assert slow.reads == [(0, 2)]


def test_a_block_is_no_miss_while_its_next_copy_is_sought(clock, monkeypatch):
    """Who opened it in that instant computed it anew."""
    near, far = SlowTier("near"), SlowTier("far")
    header, gate, asked = far.header, threading.Event(), threading.Event()

    def waiting(key):
        asked.set()
        gate.wait(10)
        return header(key)

    with TieredStore([TierSlot(near), TierSlot(far)], clock=clock, aside=at_once) as store:
        put(store, 1)
        with open_block(store, 1) as one:
            monkeypatch.setattr(far, "header", waiting)
            near.delete(make_key(1))
            thread = threading.Thread(target=lambda: one.read(0, 2))
            thread.start()
            assert asked.wait(10)
            with open_block(store, 1) or contextlib.nullcontext() as other:
                gate.set()
                thread.join()
                assert other is not None
                assert other.read(0, 2) == list(make_block(1).segments)
                assert other.tier == "far"


def test_closing_does_not_wait_for_a_read_which_keeps_its_pin(store, ram, slow):
    put(store, 1)
    ram.delete(make_key(1))
    reader = open_block(store, 1)
    slow.gate = threading.Event()
    results = []
    thread = threading.Thread(target=lambda: results.extend(reader.read(0, 2)))
    thread.start()
    assert slow.waiting.wait(10)
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.read(0, 1)
    assert store.stats().open_blocks == 1
    slow.gate.set()
    thread.join()
    assert results == list(make_block(1).segments)
    assert store.stats().open_blocks == 0


def test_fetch_leaves_admission_to_the_caller(store, ram, slow):
    put(store, 1)
    ram.delete(make_key(1))
    reader = open_block(store, 1)
    first = reader.fetch(0, 1)
    assert (first.tier, first.read_nbytes, first.admit) == ("slow", 4096, None)
    last = reader.fetch(0, 2)
    assert (last.tier, last.read_nbytes) == ("slow", 4096)
    assert last.segments == list(make_block(1).segments)
    assert reader.fetch(0, 2).read_nbytes == 0
    reader.close()
    assert store.stats().open_blocks == 1
    assert not ram.contains(make_key(1))
    last.admit()
    assert ram.contains(make_key(1))
    assert store.stats().open_blocks == 0


def test_each_handle_closes_once_and_the_pin_goes_with_the_last(store, ram, slow):
    put(store, 1)
    one, other = open_block(store, 1), open_block(store, 1)
    views = one.read(0, 2)
    one.close()
    one.close()
    with pytest.raises(StoreError, match="closed"):
        one.read(0, 1)
    assert store.stats().open_blocks == 1
    for name in range(2, 8):  # more than the fast tier holds
        put(store, name)
    assert ram.contains(make_key(1))
    other.close()
    assert store.stats().open_blocks == 0
    for name in range(8, 12):
        put(store, name)
    assert not ram.contains(make_key(1))
    assert views == list(make_block(1).segments)


def test_a_block_replaced_and_put_back_while_it_is_read_is_not_damaged(store, ram, slow):
    """What was read is of the version between: the copy that lies there by then is sound."""
    put(store, 1)
    ram.delete(make_key(1))
    between = make_block(1, version=1)

    def replaced(key, first, last):
        del slow.segments  # once
        RamTier.put(slow, key, between)
        views = slow.segments(key, first, last)
        RamTier.put(slow, key, make_block(1))
        return views

    with open_block(store, 1) as reader:
        slow.segments = replaced
        with pytest.raises(DamagedBlockError, match="checksum"):
            reader.read(0, 1)
    assert of(store, "slow").damaged == 0
    with open_block(store, 1) as reader:
        assert reader.read(0, 2) == list(make_block(1).segments)


def test_readers_keep_what_they_have_when_the_block_is_deleted_or_put_again(store):
    put(store, 1)
    with open_block(store, 1) as reader:
        old = reader.read(0, 1)
        store.put(make_key(1), make_block(1, version=1))
        # Never segments of two versions through one reader.
        with pytest.raises(DamagedBlockError):
            reader.read(1, 2)
        assert old == [make_block(1).segments[0]]
    assert sum(tier.damaged for tier in store.stats().tiers) == 0
    with open_block(store, 1) as reader:
        assert reader.read(0, 2) == list(make_block(1, version=1).segments)
        store.delete(make_key(1))
        assert open_block(store, 1) is None
        assert reader.read(0, 2) == list(make_block(1, version=1).segments)
    assert open_block(store, 1) is None


def test_an_old_reader_does_not_promote_over_a_new_block_or_a_deleted_one(store, ram, slow):
    for act in (
        lambda: store.put(make_key(1), make_block(1, version=1)),
        lambda: store.delete(make_key(1)),
    ):
        store.put(make_key(1), make_block(1))
        ram.delete(make_key(1))
        with open_block(store, 1) as reader:
            reader.read(0, 1)
            # The rest is read, and only then do the others act; the promotion comes last.
            slow.gate = threading.Event()
            thread = threading.Thread(target=lambda reader=reader: _swallow(reader))
            thread.start()
            act()
            slow.gate.set()
            thread.join()
            slow.gate = None
        found = open_block(store, 1)
        if found is not None:
            with found:
                assert found.read(0, 2) == list(make_block(1, version=1).segments)


def _swallow(reader):
    with contextlib.suppress(DamagedBlockError):
        reader.read(0, 2)


# -- promotion, limits and protection ----------------------------------------------------------


def test_promotion_after_the_last_segment(store, ram):
    put(store, 1)
    ram.delete(make_key(1))
    with open_block(store, 1) as reader:
        reader.read(1, 2)
        assert not ram.contains(make_key(1))
        reader.read(0, 1)
        assert ram.contains(make_key(1))
        assert reader.tier == "slow"
    with open_block(store, 1) as reader:
        assert reader.tier == "ram"
        assert reader.read(0, 2) == list(make_block(1).segments)
    assert bytes(ram._held[make_key(1)].data) == whole_bytes(make_block(1))


def test_three_tiers_promote_to_all_faster_ones():
    tiers = [RamTier("a"), SlowTier("b"), SlowTier("c")]
    with TieredStore([TierSlot(tier) for tier in tiers]) as store:
        tiers[2].put(make_key(1), make_block(1))
        with open_block(store, 1) as reader:
            assert reader.tier == "c"
            reader.read(0, 2)
        assert all(tier.contains(make_key(1)) for tier in tiers)


def test_the_limit_holds_and_the_oldest_goes(store, ram):
    for name in range(6):
        put(store, name)
        assert of(store, "ram").nbytes == ram.nbytes <= 4 * SIZE
    assert [ram.contains(make_key(name)) for name in range(6)] == [False] * 2 + [True] * 4
    assert of(store, "ram").evictions == 2
    with open_block(store, 2):  # used: 3 is the oldest now
        pass
    put(store, 6)
    assert ram.contains(make_key(2))
    assert not ram.contains(make_key(3))


def test_a_block_that_is_hot_in_memory_is_not_the_oldest_on_disk(slow):
    with TieredStore([TierSlot(RamTier()), TierSlot(slow, 3 * SIZE)]) as store:
        for name in range(3):
            put(store, name)
        with open_block(store, 0) as reader:
            assert reader.tier == "ram"
        put(store, 3)
        assert slow.contains(make_key(0))
        assert not slow.contains(make_key(1))


def test_a_block_above_the_limit_is_not_admitted(store, ram, slow):
    put(store, 1)
    big = make_block(2, segment_nbytes=3 * SIZE)
    outcome = store.put(make_key(2), big)
    assert outcome.tiers == ("slow",)
    assert outcome.durable
    assert outcome.refused[0][0] == "ram"
    assert ram.contains(make_key(1))
    with open_block(store, 2) as reader:
        reader.read(0, 2)
    assert not ram.contains(make_key(2))


def test_a_tier_that_cannot_take_a_new_version_does_not_answer_with_the_old(store, ram):
    put(store, 1)
    bigger = make_block(1, version=1, segment_nbytes=3 * SIZE)
    assert store.put(make_key(1), bigger).tiers == ("slow",)
    assert not ram.contains(make_key(1))
    with open_block(store, 1) as reader:
        assert reader.read(0, 2) == list(bigger.segments)


def test_protected_blocks_keep_their_last_durable_copy(slow):
    ram = RamTier()
    with TieredStore([TierSlot(ram, SIZE), TierSlot(slow, 3 * SIZE)]) as store:
        store.protect([make_key(0)])  # before it is put
        put(store, 0)
        put(store, 1, protected=True)
        for name in range(2, 6):
            assert put(store, name).durable
        assert slow.contains(make_key(0))
        assert slow.contains(make_key(1))
        assert not ram.contains(make_key(0))  # the copy in memory competes
        put(store, 6, protected=True)
        outcome = put(store, 7)
        assert outcome.tiers == ("ram",)
        assert not outcome.durable
        store.unprotect([make_key(0)])
        assert put(store, 8).durable
        assert not slow.contains(make_key(0))


def test_only_the_slowest_durable_copy_is_protected():
    tiers = [SlowTier("near"), SlowTier("far")]
    with TieredStore([TierSlot(tiers[0], SIZE), TierSlot(tiers[1], 2 * SIZE)]) as store:
        put(store, 0, protected=True)
        put(store, 1)
        assert [tier.contains(make_key(0)) for tier in tiers] == [False, True]
        # The far copy is lost: the near one becomes the last, and stays.
        with open_block(store, 0) as reader:
            reader.read(0, 2)
        assert tiers[0].contains(make_key(0))
        damage(tiers[1], 0, position=1)
        tiers[0].down = True
        assert open_block(store, 0) is None
        tiers[0].down = False
        assert not tiers[1].contains(make_key(0))
        put(store, 2)
        assert tiers[0].contains(make_key(0))


def test_a_block_of_another_process_is_found_entered_and_protected(store, slow):
    store.protect([make_key(1)])
    slow.put(make_key(1), make_block(1))
    assert store.contains(make_key(1))
    with open_block(store, 1) as reader:
        assert reader.read(0, 2) == list(make_block(1).segments)
    assert of(store, "slow").nbytes == SIZE


def test_a_vanished_block_is_a_miss_and_the_books_are_corrected(store, ram, slow):
    put(store, 1)
    ram.delete(make_key(1))
    with open_block(store, 1) as reader:
        assert of(store, "ram").blocks == 0
        reader.read(0, 1)
        slow.delete(make_key(1))
        with pytest.raises(DamagedBlockError, match="gone"):
            reader.read(0, 2)
    assert open_block(store, 1) is None
    assert [(tier.nbytes, tier.blocks) for tier in store.stats().tiers] == [(0, 0), (0, 0)]


def test_what_a_tier_holds_is_entered_at_the_start_in_the_order_of_use(tmp_path):
    with TieredStore([TierSlot(DiskTier(tmp_path))]) as store:
        for name in range(4):
            put(store, name)
    with TieredStore([TierSlot(DiskTier(tmp_path), 2 * SIZE)]) as store:
        assert of(store, "disk").nbytes == 4 * SIZE  # kept until room is needed
        put(store, 4)
        assert set(store.keys()) == {make_key(3), make_key(4)}
        assert of(store, "disk").nbytes == 2 * SIZE


# -- tiers that fail ---------------------------------------------------------------------------


def test_a_failing_tier_is_bypassed_and_comes_back(store, slow, clock, caplog):
    put(store, 1)
    slow.down = True
    with caplog.at_level(logging.WARNING):
        outcome = put(store, 2)
    assert outcome.tiers == ("ram",)
    assert not outcome.durable
    assert outcome.refused == (("slow", "no route to it"),)
    assert "slow" in caplog.text
    assert not of(store, "slow").healthy
    assert of(store, "slow").errors == 1
    calls = slow.calls
    with open_block(store, 2) as reader:
        reader.read(0, 2)
    assert open_block(store, 3) is None
    assert put(store, 3).tiers == ("ram",)
    assert store.locate([make_key(9)]) == [None]
    assert slow.calls == calls  # left alone meanwhile
    slow.down = False
    clock.now += 1.01
    assert put(store, 3).durable
    assert of(store, "slow").healthy


def test_the_pause_doubles_up_to_a_minute(store, slow, clock):
    slow.down = True
    pauses = []
    open_block(store, 1)
    for _ in range(9):
        calls = slow.calls
        start = clock.now
        while slow.calls == calls:
            clock.now += 0.5
            assert open_block(store, 1) is None
        pauses.append(clock.now - start)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_success_of_another_kind_does_not_shorten_the_pause(clock):
    health = Health(clock)
    assert health.failed("read") == 1
    assert health.worked("lookup")
    assert health.healthy
    assert health.failed("read") == 2
    assert health.worked("lookup")
    assert health.failed("write") == 1
    clock.now += 1
    assert health.failed("lookup") == 2  # an outage is one, whatever is asked
    assert health.worked("read")
    assert not health.worked("write")
    assert [health.failed("read"), health.healthy] == [1, False]


def test_a_tier_that_fails_in_the_middle_of_a_read(store, ram, slow):
    put(store, 1)
    ram.delete(make_key(1))
    far = open_block(store, 1)
    far.read(0, 1)
    slow.down = True
    with far, pytest.raises(DamagedBlockError, match="no route"):
        far.read(0, 2)
    assert of(store, "slow").damaged == 0
    assert slow._held  # an outage is no reason to throw blocks away


def test_a_faster_tier_that_fails_is_passed_over_while_reading(clock):
    near, far = SlowTier("near", durable=False), SlowTier("far")
    with TieredStore([TierSlot(near), TierSlot(far)], clock=clock, aside=at_once) as store:
        put(store, 1)
        with open_block(store, 1) as reader:
            assert reader.tier == "near"
            reader.read(0, 1)
            near.down = True
            assert reader.read(0, 2) == list(make_block(1).segments)
            assert reader.tier == "far"


def test_a_tier_that_is_down_at_the_start(clock):
    slow = SlowTier()
    slow.put(make_key(1), make_block(1))
    slow.down = True
    with TieredStore(
        [TierSlot(RamTier()), TierSlot(slow, SIZE)], clock=clock, aside=at_once
    ) as store:
        store.protect([make_key(1)])
        assert open_block(store, 1) is None
        slow.down = False
        clock.now += 2
        # Its books are filled when it is back, and what they protect holds at once.
        assert not put(store, 2).durable
        with open_block(store, 1) as reader:
            reader.read(0, 2)
        assert of(store, "slow").nbytes == SIZE


def test_a_full_disk_still_answers(store, slow):
    put(store, 1)
    slow.full = True
    outcome = put(store, 2)
    assert not outcome.durable
    assert outcome.refused == (("slow", "no space left"),)
    assert of(store, "slow").healthy
    assert of(store, "slow").nbytes == SIZE
    slow.full = False
    assert put(store, 2).durable


def test_a_failed_eviction_loses_nothing(clock):
    class Stuck(SlowTier):
        stuck = False

        def delete(self, key):
            if self.stuck:
                raise TierError(self.name, "read-only")
            return super().delete(key)

    stuck = Stuck()
    with TieredStore([TierSlot(stuck, 2 * SIZE)], clock=clock, aside=at_once) as store:
        put(store, 1)
        put(store, 2)
        stuck.stuck = True
        assert put(store, 3).tiers == ()
        stuck.stuck = False
        clock.now += 2
        assert of(store, "slow").nbytes == 2 * SIZE == stuck.nbytes
        assert put(store, 3).durable
        assert set(store.keys()) == {make_key(2), make_key(3)}


def test_delete_and_keys_tell_that_a_tier_was_not_asked(store, ram, slow):
    put(store, 1)
    slow.down = True
    with pytest.raises(TierError, match="slow"):
        store.delete(make_key(1))
    assert not ram.contains(make_key(1))  # the others are done all the same
    with pytest.raises(TierError, match="slow"):
        store.keys()
    slow.down = False
    assert store.delete(make_key(1))


def test_a_bug_in_a_tier_leaves_no_reservation_open(store, slow, monkeypatch):
    monkeypatch.setattr(slow, "put", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        put(store, 1)
    monkeypatch.undo()
    assert of(store, "slow").nbytes == 0
    assert put(store, 1).durable


@pytest.mark.parametrize("whole", [False, True])
def test_a_bug_in_a_tier_leaves_no_pin(clock, monkeypatch, whole):
    """Of what was found in the faster tier neither."""
    near, far = SlowTier("near"), SlowTier("far")
    with TieredStore([TierSlot(near), TierSlot(far)], clock=clock, aside=at_once) as store:
        for name in range(3):
            put(store, name)
        near.delete(make_key(1))
        with monkeypatch.context() as patch:
            patch.setattr(far, "header", lambda key: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                store.open_many(wanted(range(3)), whole=whole)
        assert store.stats().open_blocks == 0
        for slot in store._placement.slots:
            assert not any(entry.pins for entry in slot.ledger._entries.values())


def test_many_threads(tmp_path):
    """Puts, reads and deletes at once: only whole blocks are seen, the limits and sums hold."""
    slots = [TierSlot(RamTier(), 3 * SIZE), TierSlot(DiskTier(tmp_path), 6 * SIZE)]
    with TieredStore(slots) as store:
        versions = {
            name: [make_block(name, version=version) for version in range(2)] for name in range(9)
        }

        def work(seed):
            for step in range(30):
                name = (seed * 5 + step) % 9
                act = (seed + step) % 5
                if act == 0:
                    store.delete(make_key(name))
                elif act < 3:
                    store.put(make_key(name), versions[name][(seed + step) % 2])
                else:
                    _read_some(store, name, versions[name])
                for tier in store.stats().tiers:
                    assert tier.nbytes <= tier.limit_bytes

        in_threads(6, work)
        for tier, slot in zip(store.stats().tiers, slots, strict=True):
            assert tier.nbytes == slot.tier.nbytes
            assert tier.damaged == 0
        assert store.stats().open_blocks == 0


def _read_some(store, name, versions):
    reader = open_block(store, name)
    if reader is None:
        return
    with reader:
        try:
            found = reader.read(0, 1) + reader.read(1, 2)
        except DamagedBlockError:  # deleted or replaced meanwhile
            return
        assert found in [list(block.segments) for block in versions]


def test_durable_only_leaves_memory_to_the_queries(tmp_path):
    ram, disk = RamTier(), DiskTier(tmp_path)
    with TieredStore([TierSlot(ram), TierSlot(disk)]) as store:
        block = make_block(1)
        outcome = store.put(block.header.key, block, durable_only=True)
        assert outcome.tiers == ("disk",)
        assert outcome.durable
        assert not ram.contains(block.header.key)
        assert store.locate([block.header.key]) == ["disk"]


# -- tiers that hang -----------------------------------------------------------------------------


class Hanging(SlowTier):
    """A cache behind a network. While `hangs`, each operation would end with its time-out.

    `waited`: the thread that waited, for each such operation.
    """

    def __init__(self):
        super().__init__("far", durable=False)
        self.hangs = False
        self.waited = []

    def _ask(self):
        super()._ask()
        if self.hangs:
            self.waited.append(threading.current_thread().name)
            raise TierError(self.name, "timed out")


def test_reads_in_flight_wait_for_one_time_out_in_all(clock):
    """Each had a time-out of its own: sixteen chunks, four threads, four time-outs."""
    far = Hanging()
    with TieredStore([TierSlot(far)], clock=clock) as store:
        _until_aside_ends()  # the books are filled
        for name in range(16):
            put(store, name)
        readers = [open_block(store, name) for name in range(16)]
        for reader in readers:
            reader.read(0, 1)
        far.hangs = True
        for reader in readers:
            with pytest.raises(DamagedBlockError, match=r"timed out|bypassed"):
                reader.read(0, 2)
            reader.close()
        assert len(far.waited) == 1
        assert of(store, "far").errors == 1


def test_blocks_opened_to_be_read_whole_wait_for_one_time_out_in_all(clock):
    far = Hanging()
    with TieredStore([TierSlot(far)], clock=clock) as store:
        _until_aside_ends()  # the books are filled
        for name in range(8):
            put(store, name)
        far.hangs = True
        assert store.open_many(wanted(range(8)), whole=True) == [None] * 8
        assert len(far.waited) == 1
        assert of(store, "far").errors == 1


def test_a_tier_that_hangs_is_tried_by_nobody_who_asks(clock):
    far = Hanging()
    with TieredStore([TierSlot(RamTier(), 0), TierSlot(far)], clock=clock) as store:
        _until_aside_ends()  # the books are filled
        put(store, 1)
        far.hangs = True
        assert open_block(store, 1) is None
        mine = threading.current_thread().name
        assert far.waited == [mine]
        for _ in range(4):
            clock.now += 100
            assert open_block(store, 1) is None
            assert store.locate([make_key(1)]) == [None]
            assert put(store, 2).tiers == ()
            _until_aside_ends()
        assert far.waited[1:] == ["kvrag-aside"] * 4
        far.hangs = False
        clock.now += 100
        store.locate([make_key(1)])  # a trial falls due
        _until(lambda: of(store, "far").healthy)
        with open_block(store, 1) as reader:
            assert reader.read(0, 2) == list(make_block(1).segments)


def test_a_trial_that_finds_no_thread_falls_due_again(clock, caplog):
    def none_left(work):
        raise RuntimeError("can't start new thread")

    far = Hanging()
    with TieredStore([TierSlot(far)], clock=clock, aside=none_left) as store:
        far.hangs = True
        assert open_block(store, 1) is None
        for _ in range(2):
            clock.now += 100
            assert open_block(store, 1) is None
        assert caplog.text.count("can't start new thread") == 3  # and to fill the books


def test_deleting_many_blocks_waits_for_a_hanging_cache_once(clock):
    far = Hanging()
    with TieredStore([TierSlot(SlowTier()), TierSlot(far)], clock=clock) as store:
        _until_aside_ends()  # the books are filled
        for name in range(8):
            put(store, name)
        far.hangs = True
        for name in range(8):
            with pytest.raises(TierError, match=r"timed out|bypassed"):
                store.delete(make_key(name))
        assert len(far.waited) == 1
        assert of(store, "slow").blocks == 0  # what is durable is deleted all the same


def test_a_corpus_job_fills_what_outlives_the_process(clock):
    """Also where that may drop blocks: other processes read there what one has computed."""
    ram, far = RamTier(), Hanging()
    with TieredStore([TierSlot(ram), TierSlot(SlowTier()), TierSlot(far)], clock=clock) as store:
        outcome = put(store, 1, protected=True, durable_only=True)
        assert outcome.tiers == ("slow", "far")
        assert not ram.contains(make_key(1))
        with open_block(store, 1) as reader:
            assert not reader.in_memory


def test_what_a_cache_holds_is_no_last_copy(clock):
    """It may drop the block any time, so the durable one keeps its own, though it is faster."""
    far = Hanging()
    near = SlowTier("near")
    with TieredStore([TierSlot(near, 2 * SIZE), TierSlot(far)], clock=clock) as store:
        put(store, 0, protected=True)
        for name in range(1, 5):
            put(store, name)
        assert near.contains(make_key(0))
        assert far.contains(make_key(0))
        far.delete(make_key(0))
        with open_block(store, 0) as reader:
            assert reader.read(0, 2) == list(make_block(0).segments)


def _until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _until_aside_ends():
    _until(lambda: not any(t.name == "kvrag-aside" for t in threading.enumerate()))


def test_how_old_the_books_are_is_told(tmp_path):
    """Their counts go stale while another process writes, and nobody could see how much."""
    clock, root = FakeClock(), tmp_path / "root"
    with TieredStore([TierSlot(RamTier()), TierSlot(DiskTier(root))], clock=clock) as store:
        clock.now += 7
        with DiskTier(root) as other:
            other.put(make_key(0), make_block(0))
        ram, disk = store.stats().tiers
        assert (ram.listed_s, disk.listed_s, disk.blocks) == (0, 7, 0)
        with store.open(make_key(0), fingerprint=FINGERPRINT, token_ids=token_ids(0)):
            assert store.stats().tiers[1].blocks == 1
    away = SlowTier()
    away.down = True
    with TieredStore([TierSlot(away)], clock=clock, aside=at_once) as store:
        assert store.stats().tiers[0].listed_s is None


def test_a_limit_that_was_lowered_is_enforced_at_the_start(tmp_path, clock):
    """Nothing went until something was put, which on a server of questions alone may be never."""
    with DiskTier(tmp_path) as disk:
        for name in range(6):
            disk.put(make_key(name), make_block(name))
    slots = [TierSlot(RamTier()), TierSlot(DiskTier(tmp_path), 3 * SIZE)]
    with TieredStore(slots, clock=clock, aside=at_once) as store:
        store.protect([make_key(0), make_key(1)])
        assert store.stats().tiers[1].blocks == 6
        store.shrink()
        told = store.stats().tiers[1]
        assert (told.blocks, told.nbytes, told.evictions) == (3, 3 * SIZE, 3)
    with DiskTier(tmp_path) as disk:
        assert set(disk.keys()) > {make_key(0), make_key(1)}
    with TieredStore([TierSlot(DiskTier(tmp_path), SIZE)], clock=clock, aside=at_once) as store:
        store.protect([make_key(0), make_key(1)])
        store.shrink()
        assert set(store.keys()) == {make_key(0), make_key(1)}, "the last durable copies stay"


def test_a_tier_that_fails_while_it_shrinks_keeps_its_books(slow, clock):
    for name in range(3):
        slow.put(make_key(name), make_block(name))
    with TieredStore([TierSlot(slow, SIZE)], clock=clock, aside=at_once) as store:
        slow.down = True
        store.shrink()
        told = of(store, "slow")
        assert (told.blocks, told.healthy) == (3, False)


def test_a_found_block_that_could_not_be_put_there_is_read_all_the_same(ram):
    """Its footprint is a bound: a sealed block at the edge of it made opening raise."""

    class Tight(SlowTier):
        def footprint(self, header):
            raise TierFullError(self.name, "the block cannot be sealed")

    tight = Tight()
    with TieredStore([TierSlot(ram), TierSlot(tight)], aside=at_once) as store:
        block = make_block(1)
        tight.put(make_key(1), block)  # as another process does
        with open_block(store, 1) as reader:
            assert reader.tier == tight.name
            assert reader.read(0, 2) == list(block.segments)
