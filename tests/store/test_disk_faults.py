"""What an operating system does to a folder of blocks: each fault is made, none is imitated unless
it says so."""

from __future__ import annotations

import errno
import os
import shutil
import textwrap
import time
from pathlib import Path

import pytest

from kvrag.store.disk import DiskTier
from kvrag.store.errors import DamagedBlockError, TierFullError
from kvrag.store.tiered import TieredStore, TierSlot
from tests.mounts import mounted, remount

from .helpers import FINGERPRINT, make_block, make_key, token_ids
from .test_disk import file_of, lay, names_under, run_python


@pytest.fixture
def root(tmp_path):
    return tmp_path / "kv"


def open_block(store, name):
    return store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))


def read(store, name):
    """The segments, or None if the block is not to be had."""
    reader = open_block(store, name)
    if reader is None:
        return None
    with reader:
        try:
            return reader.read(0, 2)
        except DamagedBlockError:
            return None


def whole(name):
    return list(make_block(name).segments)


def output_of(code, *arguments):
    with run_python(textwrap.dedent(code), *arguments) as process:
        return process.communicate(timeout=200)[0]


# ---- no room--------------------------------------------------------------------------------------


def test_no_inodes_left(tmp_path):
    with mounted(tmp_path / "small", "nr_inodes=30") as folder, DiskTier(folder / "kv") as tier:
        put = []

        def fill():
            for name in range(30):
                tier.put(make_key(name), make_block(name))
                put.append(name)

        with pytest.raises(TierFullError, match="No space left"):
            fill()
        assert put
        assert len(names_under(folder / "kv")) == len(put)
        assert all(tier.segments(make_key(name), 0, 2) == whole(name) for name in put)
        assert tier.nbytes == sum(make_block(name).nbytes for name in put)
        tier.delete(make_key(put[0]))
        assert not tier.contains(make_key(put[0]))


def test_a_read_only_folder_is_read(tmp_path):
    """A block that could not be written took the whole tier out of service, for reading too."""
    with mounted(tmp_path / "small", "size=4m") as folder:
        root = folder / "kv"
        with DiskTier(root) as tier:
            for name in (1, 2):
                tier.put(make_key(name), make_block(name))
        path = file_of(root, make_key(2))
        path.write_bytes(path.read_bytes()[:-1])
        leftover = path.with_name(f".{'0' * 64}.dead.tmp")
        leftover.write_bytes(b"half")
        old = time.time() - 10**6
        os.utime(file_of(root, make_key(1)), (old, old))
        remount(folder, "ro")
        with TieredStore([TierSlot(DiskTier(root))]) as store:
            for _ in range(2):
                assert read(store, 1) == whole(1)
                outcome = store.put(make_key(3), make_block(3))
                assert outcome.tiers == ()
                assert "Read-only" in outcome.refused[0][1]
                assert open_block(store, 2) is None  # damaged, and it cannot be put aside
            with pytest.raises(TierFullError):
                store.delete(make_key(1))
            (disk,) = store.stats().tiers
            assert disk.healthy
            assert disk.blocks == 2
            remount(folder, "rw")
            assert open_block(store, 2) is None
            assert store.put(make_key(2), make_block(2)).durable
            assert store.put(make_key(3), make_block(3)).durable
            assert [read(store, name) for name in (1, 2, 3)] == [whole(name) for name in (1, 2, 3)]
        with DiskTier(root):
            assert not leftover.exists()


def test_out_of_file_descriptors(root):
    printed = output_of(
        """
        import resource, sys, time
        from kvrag.store.disk import DiskTier
        from kvrag.store.tiered import TieredStore, TierSlot
        from tests.store.helpers import FINGERPRINT, make_block, make_key, token_ids

        clock = [0.0]
        def known(name):
            reader = store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))
            if reader is None:
                return None
            with reader:
                return reader.read(0, 2) == list(make_block(name).segments)

        with TieredStore([TierSlot(DiskTier(sys.argv[1]))], clock=lambda: clock[0]) as store:
            store.put(make_key(1), make_block(1))
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
            print(known(1), store.put(make_key(2), make_block(2)).durable)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            clock[0] = 100.0
            deadline = time.monotonic() + 60
            while known(1) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            print(known(1), store.put(make_key(2), make_block(2)).durable, known(2))
            print(store.stats().tiers[0].healthy, store.stats().open_blocks)
        """,
        root,
    )
    assert printed.splitlines() == ["None False", "True True True", "True 0"]
    assert len(names_under(root)) == 2


def test_out_of_memory_while_reading_holds_no_lock_and_no_pin(root):
    printed = output_of(
        """
        import resource, sys, threading
        from kvrag.store.disk import DiskTier
        from kvrag.store.tiered import TieredStore, TierSlot
        from tests.store.helpers import FINGERPRINT, make_block, make_key, token_ids

        block = make_block(1, segment_nbytes=2**26)
        with TieredStore([TierSlot(DiskTier(sys.argv[1], fsync=False), block.nbytes)]) as store:
            store.put(make_key(1), block)
            del block
            reader = store.open(make_key(1), fingerprint=FINGERPRINT, token_ids=token_ids(1))
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**25, hard))
            try:
                reader.read(0, 2)
            except MemoryError:
                print("no memory")
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            found = []
            other = threading.Thread(target=lambda: found.append(len(reader.read(0, 1)[0])))
            other.start()
            other.join(60)
            print(found, store.stats().open_blocks)
            reader.close()
            small = make_block(2)
            print(store.stats().open_blocks, store.put(make_key(2), small).durable)
        """,
        root,
    )
    # Where the block was pinned for good, it could not be evicted for the next.
    assert printed.splitlines() == ["no memory", f"[{2**26}] 1", "0 True"]


# ---- what others do to the folder-----------------------------------------------------------------


@pytest.mark.parametrize("removed", ["", "blocks", "quarantine"])
def test_a_folder_removed_under_an_open_store(root, removed):
    with TieredStore([TierSlot(DiskTier(root), 3 * make_block(1).nbytes)]) as store:
        for name in range(3):
            store.put(make_key(name), make_block(name))
        reader = open_block(store, 0)
        (root / "quarantine").mkdir(mode=0o700)
        shutil.rmtree(root / removed)
        lost = removed != "quarantine"
        with reader:
            assert (read(store, 0) is None) == lost
        for name in range(3):
            assert (read(store, name) is None) == lost
            assert store.put(make_key(name), make_block(name)).durable
            assert read(store, name) == whole(name)
        (disk,) = store.stats().tiers
        assert (disk.blocks, disk.errors, disk.healthy) == (3, 0, True)
        assert disk.nbytes == sum(path.stat().st_size for path in root.rglob("*.kv"))
        for folder in [root, *root.rglob("*/")]:
            assert folder.stat().st_mode & 0o077 == 0, folder
        path = file_of(root, make_key(1))
        path.write_bytes(b"x" * 5000)
        assert read(store, 1) is None
        assert len(list((root / "quarantine").iterdir())) == 1
        assert store.stats().tiers[0].errors == 0


def _cut(path, header):
    os.truncate(path, header.segments[1].offset + 10)


def _empty(path, header):
    os.truncate(path, 0)


def _zeros_behind(path, header):
    size = path.stat().st_size
    os.truncate(path, header.segments[1].offset)
    os.truncate(path, size)


def _zeros(path, header):
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


def _flip(path, header):
    with path.open("r+b") as file:
        file.seek(header.segments[1].offset + 3)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _remove(path, header):
    path.unlink()


@pytest.mark.parametrize("change", [_cut, _empty, _zeros_behind, _zeros, _flip, _remove])
def test_a_file_that_changes_behind_its_open_reader(root, change):
    """No byte of it is handed out, and what was read before stays as it was."""
    with TieredStore([TierSlot(DiskTier(root))]) as store:
        store.put(make_key(1), make_block(1, segment_nbytes=9000))
        expected = list(make_block(1, segment_nbytes=9000).segments)
        with open_block(store, 1) as reader:
            first = reader.read(0, 1)
            change(file_of(root, make_key(1)), reader.header)
            with pytest.raises(DamagedBlockError):
                reader.read(1, 2)
            assert first == reader.read(0, 1) == expected[:1]
        (disk,) = store.stats().tiers
        assert (disk.blocks, disk.nbytes) == (0, 0)
        assert disk.damaged == (change is not _remove)
        assert open_block(store, 1) is None
        assert store.put(make_key(1), make_block(1)).durable
        assert read(store, 1) == whole(1)


def test_a_sector_that_cannot_be_read_costs_one_block(root, monkeypatch):
    """Imitated: nothing here breaks a disk."""
    with TieredStore([TierSlot(DiskTier(root))]) as store:
        for name in (1, 2):
            store.put(make_key(name), make_block(name))
        bad = file_of(root, make_key(1)).stat().st_ino
        real = os.preadv

        def preadv(descriptor, *arguments):
            if os.fstat(descriptor).st_ino == bad:
                raise OSError(errno.EIO, "Input/output error")
            return real(descriptor, *arguments)

        monkeypatch.setattr(os, "preadv", preadv)
        assert open_block(store, 1) is None
        assert read(store, 2) == whole(2)
        (disk,) = store.stats().tiers
        assert (disk.damaged, disk.errors, disk.healthy) == (1, 0, True)


# ---- quarantine and the clock---------------------------------------------------------------------


def test_quarantine_takes_little_room(root):
    """It held 16 blocks of any size, beside the limit of the tier."""
    with DiskTier(root) as tier:
        for name in range(5):
            path = lay(root, make_key(name), b"")
            os.truncate(path, 20 * 2**20)
            tier.quarantine(make_key(name))
        kept = [path.name.split(".")[2] for path in sorted((root / "quarantine").iterdir())]
        assert kept == [make_key(name).digest for name in (2, 3, 4)]
        path = lay(root, make_key("large"), b"")
        os.truncate(path, 100 * 2**20)
        tier.quarantine(make_key("large"))
        (kept,) = (root / "quarantine").iterdir()
        assert make_key("large").digest in kept.name


def test_folders_in_the_place_of_blocks_do_not_stop_quarantine(root):
    with DiskTier(root) as tier:
        for name in range(18):
            file_of(root, make_key(name)).mkdir(parents=True)
            tier.quarantine(make_key(name))
        assert len(list((root / "quarantine").iterdir())) == 16


def test_the_clock_set_back_does_not_make_the_newest_quarantined_the_first_to_go(root, monkeypatch):
    """The clock is imitated here and below: setting the machine's would harm others."""
    now = time.time_ns()
    with DiskTier(root) as tier:
        for name in range(20):
            with monkeypatch.context() as patch:
                patch.setattr(time, "time_ns", lambda name=name: now - name * 10**9)
                tier.put(make_key(name), make_block(name))
                tier.quarantine(make_key(name))
        kept = [path.name.split(".")[2] for path in sorted((root / "quarantine").iterdir())]
        assert kept == [make_key(name).digest for name in range(4, 20)]


def test_blocks_from_the_future_do_not_stay_the_newest(root):
    with DiskTier(root) as tier:
        for name in range(3):
            tier.put(make_key(name), make_block(name))
    future = time.time() + 10**8
    os.utime(file_of(root, make_key(0)), (future, future))
    os.utime(file_of(root, make_key(1)), (time.time() - 7200,) * 2)
    with DiskTier(root) as tier:
        assert tier.entries()[0].key == make_key(1)
    assert file_of(root, make_key(0)).stat().st_mtime <= time.time()
    # From now on it ages like any other.
    later = time.time() + 60
    os.utime(file_of(root, make_key(2)), (later, later))
    with DiskTier(root) as tier:
        assert {entry.key for entry in tier.entries()[1:]} == {make_key(0), make_key(2)}


def test_uses_are_noted_again_after_the_clock_was_set_back(root, monkeypatch):
    """They were not until the clock came to where it had been."""
    with DiskTier(root) as tier:
        tier.put(make_key(1), make_block(1))
        earlier = time.time() - 10**6
        monkeypatch.setattr(time, "time", lambda: earlier)
        tier.touch(make_key(1))
        assert file_of(root, make_key(1)).stat().st_mtime == pytest.approx(earlier, abs=1)


# ---- what is promised of writing------------------------------------------------------------------


def _recorded(monkeypatch):
    """Calls that matter to a power loss, in order; they are made all the same."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        calls.append(f"sync {kind}")
        real_fsync(descriptor)

    def replace(*arguments):
        calls.append("rename")
        real_replace(*arguments)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return calls


def test_with_fsync_a_block_is_on_the_device_before_it_has_its_name(root, monkeypatch):
    with DiskTier(root) as tier:
        calls = _recorded(monkeypatch)
        tier.put(make_key(1), make_block(1))
        assert calls[-3:] == ["sync file", "rename", "sync folder"]
        # The new folders on the way to it too: kv/blocks, its tag's, and the one of two digits.
        assert calls[:-3] == ["sync folder"] * len(calls[:-3])
        assert len(calls) >= 5
        calls.clear()
        tier.put(make_key(1), make_block(1, version=1))
        assert calls == ["sync file", "rename", "sync folder"]


def test_without_fsync_nothing_waits_for_the_device(root, monkeypatch):
    calls = _recorded(monkeypatch)
    with DiskTier(root, fsync=False) as tier:
        tier.put(make_key(1), make_block(1))
        tier.put(make_key(1), make_block(1, version=1))
        assert calls == ["rename"] * 2
        assert tier.header(make_key(1)) == make_block(1, version=1).header


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count writes")
def test_a_put_writes_the_block_and_nothing_else(root):
    """However many blocks there are: no list of them is written anew each time."""

    def written():
        text = Path("/proc/self/io").read_text()
        return int(next(line for line in text.splitlines() if line.startswith("wchar")).split()[1])

    with TieredStore([TierSlot(DiskTier(root, fsync=False), 110 * make_block(0).nbytes)]) as store:
        for name in range(100):
            store.put(make_key(name), make_block(name))
        blocks = [make_block(name) for name in range(100, 140)]
        before = written()
        for block in blocks:  # the last thirty evict
            store.put(block.header.key, block)
        for block in blocks:
            store.open(block.header.key, fingerprint=FINGERPRINT, token_ids=block.header.token_ids)
        assert store.stats().tiers[0].evictions == 30
        assert written() - before == sum(block.nbytes for block in blocks)
