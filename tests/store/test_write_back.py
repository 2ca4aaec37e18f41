"""Writing back: a bounded queue, what a crash loses, and that only what is owed is written."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from kvrag.store.disk import DiskTier
from kvrag.store.ram import RamTier, _Held
from kvrag.store.tiered import TieredStore, TierSlot

from .doubles import SlowTier, in_threads
from .helpers import FINGERPRINT, make_block, make_key, token_ids, whole_bytes

SIZE = make_block(0).nbytes


class GatedTier(SlowTier):
    """Writes wait for `open_gate`, and set `writing`."""

    def __init__(self):
        super().__init__()
        self.open_gate, self.writing = threading.Event(), threading.Event()

    def put(self, key, block):
        self.writing.set()
        assert self.open_gate.wait(10)
        super().put(key, block)


@pytest.fixture
def ram():
    return RamTier()


@pytest.fixture
def slow():
    return GatedTier()


@pytest.fixture
def store(ram, slow):
    slots = [TierSlot(ram, 8 * SIZE), TierSlot(slow, write="back")]
    with TieredStore(slots, write_back_nbytes=2 * SIZE) as store:
        yield store
        slow.open_gate.set()


def put(store, name, version=0, **options):
    return store.put(make_key(name), make_block(name, version=version), **options)


def of(store, name):
    return next(tier for tier in store.stats().tiers if tier.name == name)


def test_a_put_returns_before_the_slow_tier_has_it(store, slow):
    outcome = put(store, 0)
    assert outcome.tiers == ("ram",)
    assert outcome.pending == ("slow",)
    assert not outcome.durable
    assert not outcome.lost
    assert not store.holds_durably(make_key(0))
    assert of(store, "slow").pending_blocks == 1
    assert of(store, "slow").pending_nbytes == SIZE
    slow.open_gate.set()
    store.flush()
    assert store.holds_durably(make_key(0))
    assert bytes(slow._held[make_key(0)].data) == whole_bytes(make_block(0))
    assert of(store, "slow").pending_blocks == of(store, "slow").pending_nbytes == 0


def test_a_full_queue_writes_through_and_waits(store, slow):
    for name in range(2):
        assert put(store, name).pending == ("slow",)
    assert slow.writing.wait(10)
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(put(store, 2)))
    thread.start()
    time.sleep(0.05)
    assert not outcomes  # the caller is held back as long as the tier is
    assert of(store, "slow").pending_nbytes <= 2 * SIZE
    slow.open_gate.set()
    thread.join()
    assert outcomes[0].durable
    assert outcomes[0].pending == ()


def test_what_waits_is_not_evicted(store, ram, slow):
    put(store, 0)
    for name in range(1, 12):
        ram_only = threading.Thread(target=put, args=(store, name), daemon=True)
        ram_only.start()
    time.sleep(0.05)
    assert ram.contains(make_key(0))
    slow.open_gate.set()
    store.flush()
    assert store.holds_durably(make_key(0))


def test_a_corpus_job_is_written_through(store, slow):
    slow.open_gate.set()
    outcome = put(store, 0, durable_only=True)
    assert (outcome.tiers, outcome.durable, outcome.pending) == (("slow",), True, ())


def test_what_no_memory_takes_is_written_through(slow):
    slow.open_gate.set()
    slots = [TierSlot(RamTier(), SIZE - 1), TierSlot(slow, write="back")]
    with TieredStore(slots) as store:
        assert put(store, 0).durable


def test_a_deleted_block_is_not_written(store, slow):
    put(store, 0)
    assert slow.writing.wait(10)
    put(store, 1)  # waits behind the first
    deleted = threading.Thread(target=store.delete, args=(make_key(1),))
    deleted.start()
    deleted.join()
    slow.open_gate.set()
    store.flush()
    assert slow.contains(make_key(0))
    assert not slow.contains(make_key(1))
    assert of(store, "ram").nbytes == SIZE


def test_nobody_waits_for_a_write_that_is_not_owed_any_more(store, slow):
    """Whoever waited for it to settle went on waiting until another block was written."""
    put(store, 0)
    assert slow.writing.wait(10)
    put(store, 1)
    write_back = store._placement.write_backs["slow"]
    thread = threading.Thread(target=write_back.settle, args=(make_key(1),), daemon=True)
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    write_back.discard(make_key(1))
    thread.join(5)
    assert not thread.is_alive()


def test_only_the_last_version_is_written(store, slow):
    put(store, 0)
    assert slow.writing.wait(10)
    put(store, 1)
    put(store, 1, version=1)
    slow.open_gate.set()
    store.flush()
    assert bytes(slow._held[make_key(1)].data) == whole_bytes(make_block(1, version=1))


def test_a_bit_that_flipped_in_memory_is_not_made_durable(store, ram, slow):
    put(store, 0)
    assert slow.writing.wait(10)
    put(store, 1)
    data = bytearray(ram._held[make_key(1)].data)
    data[5000] ^= 1
    ram._held[make_key(1)] = _Held(memoryview(bytes(data)))
    slow.open_gate.set()
    store.flush()
    assert not slow.contains(make_key(1))
    assert of(store, "ram").damaged == 1
    assert of(store, "slow").refused == 1


def test_a_write_whose_block_is_gone_is_counted_and_told(store, ram, slow, caplog):
    """The put had said that it was pending, and then nobody said anything."""
    put(store, 0)
    assert slow.writing.wait(10)
    put(store, 1)
    del ram._held[make_key(1)]
    slow.open_gate.set()
    store.flush()
    assert of(store, "slow").refused == 1
    assert "not written back to tier slow: its copy in memory is gone" in caplog.text


def retrying(slow, *pauses_s):
    """A store that tries a write again after these pauses, on a tier that answers at once."""
    slow.open_gate.set()
    slots = [TierSlot(RamTier(), 8 * SIZE), TierSlot(slow, write="back")]
    return TieredStore(slots, write_back_nbytes=2 * SIZE, write_back_pauses_s=pauses_s)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("fault", ["down", "full"])
def test_a_write_that_failed_is_tried_again(slow, fault):
    """It waits meanwhile, pinned, and lands without anybody's asking once the tier is back."""
    with retrying(slow, *[0.05] * 100) as store:
        setattr(slow, fault, True)
        put(store, 0)
        store.flush()
        assert store.contains(make_key(0))
        assert of(store, "slow").refused >= 1
        assert of(store, "slow").pending_blocks == 1
        setattr(slow, fault, False)
        wait_until(lambda: not of(store, "slow").pending_blocks)
        assert store.holds_durably(make_key(0))
        assert of(store, "slow").pending_nbytes == 0


def test_tries_are_bounded(slow, caplog):
    with retrying(slow, 0.01, 0.02) as store:
        slow.full = True
        put(store, 0)
        wait_until(lambda: not of(store, "slow").pending_blocks)
        assert of(store, "slow").refused == 3
        assert "failed 3 times" in caplog.text
        assert store.contains(make_key(0))  # in memory, where it may be evicted now
        slow.full = False
        for name in range(1, 12):
            put(store, name)
            store.flush()
        assert not store.contains(make_key(0))
        assert of(store, "slow").blocks == 11


def test_others_do_not_wait_behind_a_write_that_failed(slow):
    with retrying(slow, 60) as store:
        slow.full = True
        put(store, 0)
        store.flush()
        slow.full = False
        put(store, 1)
        store.flush()
        assert store.holds_durably(make_key(1))
        assert of(store, "slow").pending_blocks == 1
        store.delete(make_key(0))
        assert of(store, "slow").pending_blocks == 0


def test_closing_tries_once_more_and_no_longer(slow):
    store = retrying(slow, 60, 60)
    slow.full = True
    put(store, 0)
    store.flush()
    put(store, 1)
    store.flush()
    slow.full = False
    slow.close = lambda: None  # which would forget what it holds
    begun = time.monotonic()
    store.close()
    assert time.monotonic() - begun < 30
    assert {make_key(0), make_key(1)} == set(slow._held)


def test_a_tier_that_stays_down_does_not_hold_up_closing(slow):
    store = retrying(slow, 60)
    slow.down = True
    put(store, 0)
    begun = time.monotonic()
    store.close()
    assert time.monotonic() - begun < 30


def test_a_bug_in_a_tier_does_not_end_the_thread(store, slow, monkeypatch, caplog):
    slow.open_gate.set()
    monkeypatch.setattr(slow, "put", lambda *_: 1 / 0)
    put(store, 0)
    store.flush()
    assert "not written back" in caplog.text
    assert of(store, "slow").errors == 1
    monkeypatch.undo()
    put(store, 1)
    store.flush()
    assert store.holds_durably(make_key(1))


def test_close_writes_what_waits(tmp_path):
    store = TieredStore([TierSlot(RamTier()), TierSlot(DiskTier(tmp_path), write="back")])
    for name in range(20):
        put(store, name)
    store.close()
    store.close()
    with DiskTier(tmp_path) as disk:
        assert set(disk.keys()) == {make_key(name) for name in range(20)}


def test_many_threads(tmp_path):
    """Puts and deletes at once: in the end the disk has what memory has."""
    ram, disk = RamTier(), DiskTier(tmp_path)
    slots = [TierSlot(ram), TierSlot(disk, write="back")]
    with TieredStore(slots, write_back_nbytes=3 * SIZE) as store:

        def work(seed):
            for step in range(20):
                name = (seed + step) % 6
                if (seed * 3 + step) % 4:
                    put(store, name, version=(seed + step) % 2)
                else:
                    store.delete(make_key(name))

        in_threads(6, work)
        store.flush()
        assert set(ram.keys()) == set(disk.keys())
        for key in set(ram.keys()):
            assert ram.header(key) == disk.header(key)
        assert [tier.pending_nbytes for tier in store.stats().tiers] == [0, 0]


WRITER = textwrap.dedent(
    """
    import itertools, sys
    from kvrag.store.disk import DiskTier
    from kvrag.store.ram import RamTier
    from kvrag.store.tiered import TieredStore, TierSlot
    from tests.store.helpers import make_block, make_key

    slots = [TierSlot(RamTier(), 4_000_000), TierSlot(DiskTier(sys.argv[1]), write="back")]
    store = TieredStore(slots, write_back_nbytes=2_000_000)
    blocks = [make_block(name, segment_nbytes=200_000) for name in range(40)]
    print("ready", flush=True)
    for step in itertools.count():
        block = blocks[step % 40]
        if store.put(block.header.key, block).durable:
            print(step % 40, flush=True)
        elif store.holds_durably(block.header.key):
            print(step % 40, flush=True)
    """
)


def test_a_kill_loses_only_what_was_not_durable_and_never_half_a_block(tmp_path):
    for told_before in (1, 7):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        root = Path(__file__).parents[2]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as writer:
            assert writer.stdout.readline() == "ready\n"
            told = [int(writer.stdout.readline()) for _ in range(told_before)]
            writer.send_signal(signal.SIGKILL)
            told += [int(line) for line in writer.stdout.read().split("\n")[:-1]]
        with TieredStore([TierSlot(DiskTier(tmp_path))]) as store:
            for key in list(store.keys()):
                name = next(name for name in range(40) if make_key(name) == key)
                assert read(store, name)
            for name in told:
                assert read(store, name), f"block {name} was durable, and is lost"
            assert store.stats().tiers[0].damaged == 0


def read(store, name):
    reader = store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))
    if reader is None:
        return False
    with reader:
        return reader.read(0, 2) == list(make_block(name, segment_nbytes=200_000).segments)
