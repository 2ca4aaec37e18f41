from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvrag.store.block import SegmentInfo, decode_header, encode_header, verify_segment
from kvrag.store.disk import DiskTier
from kvrag.store.errors import BlockFormatError, TierError, TierFullError
from kvrag.store.layout import open_temporary
from tests.mounts import mounted

from .contract import TierContract
from .helpers import make_block, make_key, whole_bytes


def file_of(root, key):
    return root / "blocks" / key.tag / key.digest[:2] / f"{key.digest}.kv"


def lay(root, key, data):
    path = file_of(root, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names_under(root):
    return sorted(path.name for path in (root / "blocks").rglob("*") if path.is_file())


class TestDiskTier(TierContract):
    def make(self, folder):
        self.root = folder / "home" / "kv"
        return DiskTier(self.root)

    def raw_write(self, tier, key, data):
        lay(self.root, key, data)

    def raw_read(self, tier, key):
        path = file_of(self.root, key)
        return path.read_bytes() if path.exists() else None


@pytest.fixture
def root(tmp_path):
    return tmp_path / "kv"


def test_blocks_outlive_the_process(root):
    with DiskTier(root) as tier:
        for name in range(3):
            tier.put(make_key(name), make_block(name))
    with DiskTier(root) as tier:
        assert tier.nbytes == sum(make_block(name).nbytes for name in range(3))
        assert set(tier.keys()) == {make_key(name) for name in range(3)}
        assert tier.segments(make_key(2), 0, 2) == list(make_block(2).segments)


def test_entries_start_in_the_order_of_use(root):
    with DiskTier(root) as tier:
        for name in range(4):
            tier.put(make_key(name), make_block(name))
    now = time.time()
    for age, name in enumerate((2, 0, 3, 1), start=2):
        os.utime(file_of(root, make_key(name)), (now - 86400 * age,) * 2)
    with DiskTier(root) as tier:
        assert [entry.key for entry in tier.entries()] == [make_key(name) for name in (1, 3, 0, 2)]
        tier.touch(make_key(1))
    with DiskTier(root) as tier:
        assert tier.entries()[-1].key == make_key(1)


def test_touch_writes_at_most_once_a_minute(root):
    with DiskTier(root) as tier:
        tier.put(make_key(1), make_block(1))
        before = file_of(root, make_key(1)).stat().st_mtime_ns
        tier.touch(make_key(1))
        assert file_of(root, make_key(1)).stat().st_mtime_ns == before


def test_foreign_files_are_left_alone(root):
    with DiskTier(root) as tier:
        tier.put(make_key(1), make_block(1))
    folder = file_of(root, make_key(1)).parent
    strange = [
        folder / "README",
        folder / "x.kv",
        folder / (make_key(1).digest.upper() + ".kv"),
        folder / (make_key(1).digest + ".kv.bak"),
        folder.parent.parent / "notes" / "zz" / "a.kv",
        folder.parent / "00" / f"{'1' * 64}.kv",  # a digest in the wrong folder
    ]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with DiskTier(root) as tier:
        assert list(tier.keys()) == [make_key(1)]
        assert tier.nbytes == make_block(1).nbytes
    assert all(path.read_text() == "mine" for path in strange)


def test_leftovers_of_a_crash_are_removed_but_not_what_is_being_written(root):
    with DiskTier(root) as tier:
        tier.put(make_key(1), make_block(1))
    folder = file_of(root, make_key(1)).parent
    dead, live = folder / f".{'0' * 64}.dead.tmp", folder / f".{'0' * 64}.live.tmp"
    dead.write_bytes(b"half")
    with live.open("wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with DiskTier(root):
            pass
        assert not dead.exists()
        assert live.exists()


def test_a_failed_put_leaves_the_old_block_and_no_file(root, monkeypatch):
    with DiskTier(root) as tier:
        tier.put(make_key(1), make_block(1))

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(TierFullError, match="disk: No space left"):
            tier.put(make_key(1), make_block(1, version=1))
        monkeypatch.undo()
        assert tier.header(make_key(1)) == make_block(1).header
        assert names_under(root) == [f"{make_key(1).digest}.kv"]


def test_quarantine_keeps_the_newest_sixteen(root):
    with DiskTier(root) as tier:
        for name in range(20):
            tier.put(make_key(name), make_block(name))
            tier.quarantine(make_key(name))
        kept = sorted((root / "quarantine").iterdir())
        assert [path.name.split(".")[2] for path in kept] == [
            make_key(name).digest for name in range(4, 20)
        ]
        assert kept[-1].read_bytes() == whole_bytes(make_block(19))
        assert tier.nbytes == 0


def test_two_tiers_on_one_root_see_each_other(root):
    with DiskTier(root) as one, DiskTier(root) as other:
        one.put(make_key(1), make_block(1))
        assert other.contains(make_key(1))
        assert other.header(make_key(1)) == make_block(1).header
        assert other.nbytes == make_block(1).nbytes
        # A header is remembered for a file, not for a key.
        other.put(make_key(1), make_block(1, version=1, segment_nbytes=9000))
        assert one.segments(make_key(1), 1, 2) == [
            make_block(1, version=1, segment_nbytes=9000).segments[1]
        ]
        other.delete(make_key(1))
        assert one.segments(make_key(1), 0, 1) is None
        assert not one.contains(make_key(1))
        assert one.nbytes == 0


def test_a_removed_folder_is_made_again(root):
    with DiskTier(root) as tier:
        tier.put(make_key(1), make_block(1))
        path = file_of(root, make_key(1))
        path.unlink()
        path.parent.rmdir()
        tier.put(make_key(1), make_block(1))
        assert tier.contains(make_key(1))


@pytest.mark.parametrize("strange", ["folder", "link", "pipe"])
def test_what_is_no_file_is_damage(root, tmp_path, strange):
    with DiskTier(root) as tier:
        path = file_of(root, make_key(1))
        path.parent.mkdir(parents=True)
        if strange == "folder":
            path.mkdir()
        elif strange == "pipe":
            os.mkfifo(path)
        else:
            (tmp_path / "target").write_bytes(whole_bytes(make_block(1)))
            path.symlink_to(tmp_path / "target")
        with pytest.raises(BlockFormatError):
            tier.header(make_key(1))
        tier.quarantine(make_key(1))
        assert tier.header(make_key(1)) is None


def test_an_announced_size_is_not_allocated(root):
    """A forged header may announce terabytes; the file has to have them first."""
    block = make_block(1)
    with DiskTier(root) as tier:
        lay(root, make_key(1), whole_bytes(block)[: block.header.header_nbytes])
        with pytest.raises(BlockFormatError):
            tier.segments(make_key(1), 0, 2)


@pytest.mark.parametrize("mask", [0, 0o022, 0o277, 0o777])
def test_files_and_folders_are_for_us_alone(root, mask):
    """Whatever the umask.

    The folder of a tag was made as its umask had it, and a umask that takes our own rights made
    folders that nobody but root could use again.
    """
    before = os.umask(mask)
    try:
        with DiskTier(root / "made" / "kv") as tier:
            for name in range(3):
                tier.put(make_key(name), make_block(name))
            tier.quarantine(make_key(1))
            path = file_of(root / "made" / "kv", make_key(2))
            descriptor, temporary = open_temporary(path)
            os.close(descriptor)
    finally:
        os.umask(before)
    places = [root, *root.rglob("*")]
    modes = {(place.is_dir(), place.stat().st_mode & 0o7777) for place in places}
    assert modes == {(True, 0o700), (False, 0o600)}
    assert temporary in places
    assert any(place.parent.name == "quarantine" for place in places)


def test_a_hard_link_laid_in_place_gives_nothing_away_and_nothing_up(root, tmp_path):
    """Another name of a file of someone's: it is never written through, only replaced."""
    theirs = tmp_path / "theirs"
    theirs.write_bytes(b"not yours" * 1000)
    theirs.chmod(0o644)
    path = file_of(root, make_key(1))
    path.parent.mkdir(parents=True)
    for act in ("put", "quarantine", "delete"):
        os.link(theirs, path)
        with DiskTier(root) as tier:
            with pytest.raises(BlockFormatError):
                tier.header(make_key(1))
            if act == "put":
                tier.put(make_key(1), make_block(1))
                assert tier.header(make_key(1)) == make_block(1).header
                tier.delete(make_key(1))
            else:
                getattr(tier, act)(make_key(1))
        assert not path.exists()
        assert theirs.read_bytes() == b"not yours" * 1000
        assert theirs.stat().st_mode & 0o777 == 0o644


def test_a_link_laid_in_place_is_not_followed(root, tmp_path):
    """`touch` set the times of what the link points to."""
    theirs = tmp_path / "theirs"
    with DiskTier(root) as tier:
        tier.put(make_key(1), make_block(1))
    path = file_of(root, make_key(1))
    os.utime(path, (1000, 1000))
    theirs.write_bytes(path.read_bytes())
    os.utime(theirs, (1000, 1000))
    with DiskTier(root) as tier:
        path.unlink()
        path.symlink_to(theirs)
        tier.touch(make_key(1))
        assert theirs.stat().st_mtime == 1000
        with pytest.raises(BlockFormatError):
            tier.segments(make_key(1), 0, 1)
        tier.put(make_key(1), make_block(1, version=1))
        assert not path.is_symlink()
        assert theirs.read_bytes() == whole_bytes(make_block(1))


def test_a_link_laid_for_a_temporary_file_is_not_followed(root, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    with DiskTier(root) as tier:
        tier.put(make_key(1), make_block(1))
        monkeypatch.setattr("secrets.token_hex", lambda nbytes: "guessed")
        file_of(root, make_key(1)).with_name(f".{make_key(1).digest}.guessed.tmp").symlink_to(
            theirs
        )
        with pytest.raises(TierError, match="File exists"):
            tier.put(make_key(1), make_block(1, version=1))
    assert not theirs.exists()


def test_quarantine_removes_only_what_it_put_there(root):
    """Foreign files were removed, and a folder put aside made every later quarantine fail."""
    with DiskTier(root) as tier:
        note = root / "quarantine" / "0-note"
        note.parent.mkdir()
        note.write_text("mine")
        path = file_of(root, make_key("folder"))
        (path / "within").mkdir(parents=True)
        tier.quarantine(make_key("folder"))
        for name in range(17):
            tier.put(make_key(name), make_block(name))
            tier.quarantine(make_key(name))
        assert note.read_text() == "mine"
        assert len(list((root / "quarantine").iterdir())) == 16 + 1


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1",
    reason="this system promises memory that it does not have",
)
def test_a_file_with_holes_larger_than_memory_is_damage(root):
    """It has the bytes that its header announces, and takes no room on disk."""
    block = make_block(1)
    parts = [SegmentInfo(4096, 2**39, 1), SegmentInfo(4096 + 2**39, 2**39, 1)]
    header = replace(block.header, segments=tuple(parts))
    with DiskTier(root) as tier:
        path = lay(root, make_key(1), encode_header(header))
        os.truncate(path, header.nbytes)
        assert tier.header(make_key(1)) == header
        with pytest.raises(BlockFormatError, match="do not fit into memory"):
            tier.segments(make_key(1), 0, 2)


def test_a_root_that_cannot_be_used_is_an_outage(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="disk"):
        DiskTier(tmp_path / "file" / "kv")


WRITER = textwrap.dedent(
    """
    import itertools, sys
    from kvrag.store.disk import DiskTier
    from tests.store.helpers import make_block, make_key

    tier = DiskTier(sys.argv[1])
    print("ready", flush=True)
    for step in itertools.count():
        name = step % 5
        tier.put(make_key(name), make_block(name, version=step, segment_nbytes=200_000))
    """
)


def run_python(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def check_whole_blocks_only(root):
    with DiskTier(root) as tier:
        for name in names_under(root):
            assert name.endswith(".kv"), f"{name} is left over"
        keys = list(tier.keys())
        for key in keys:
            data = file_of(root, key).read_bytes()
            header = decode_header(data, expect_key=key)
            assert len(data) == header.nbytes
            for index, part in enumerate(header.segments):
                verify_segment(header, index, data[part.offset : part.end])
        return len(keys)


def test_a_killed_writer_leaves_whole_blocks_only(root):
    found = 0
    for delay_s in (0.0, 0.02, 0.051, 0.083, 0.13):
        writer = run_python(WRITER, root)
        with writer:
            assert writer.stdout.readline() == "ready\n"
            time.sleep(delay_s)
            writer.send_signal(signal.SIGKILL)
        found = check_whole_blocks_only(root)
    assert found, "no writer got as far as one block"


def test_two_processes_share_a_root(root):
    writers = [run_python(WRITER, root) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        with DiskTier(root) as tier:
            deadline = time.monotonic() + 20
            reads, seen = 0, set()
            while (reads < 50 or len(seen) < 5) and time.monotonic() < deadline:
                for name in range(5):
                    if tier.header(make_key(name)) is None:
                        continue
                    segments = tier.segments(make_key(name), 0, 2)
                    assert segments is not None
                    assert [len(view) for view in segments] == [200_704, 200_704]
                    reads += 1
                    seen.add(name)
            assert reads >= 50
            assert tier.nbytes == sum(entry.nbytes for entry in tier.entries())
    finally:
        for writer in writers:
            with writer:
                writer.kill()
    assert check_whole_blocks_only(root) == 5


@pytest.fixture
def small_file_system(tmp_path):
    with mounted(tmp_path / "small", "size=256k") as folder:
        yield folder


def test_a_full_disk(small_file_system):
    root = small_file_system / "kv"
    with DiskTier(root) as tier:
        put = []

        def fill():
            for name in range(100):
                tier.put(make_key(name), make_block(name, segment_nbytes=20_000))
                put.append(name)

        with pytest.raises(TierFullError):
            fill()
        assert put
        # Nothing half written, and what was put is readable.
        assert len(names_under(root)) == len(put)
        for name in put:
            assert tier.header(make_key(name)) is not None
        # Room again: it works again.
        tier.delete(make_key(put[0]))
        tier.put(make_key("new"), make_block("new", segment_nbytes=20_000))
        assert tier.contains(make_key("new"))


def test_a_limit_on_file_sizes_is_an_outage(root):
    code = textwrap.dedent(
        """
        import resource, sys
        from kvrag.store.disk import DiskTier
        from kvrag.store.errors import TierError
        from tests.store.helpers import make_block, make_key

        with DiskTier(sys.argv[1]) as tier:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
            try:
                tier.put(make_key(1), make_block(1))
            except TierError as exc:
                print(type(exc).__name__, tier.contains(make_key(1)))
        """
    )
    with run_python(code, root) as process:
        assert process.stdout.read() == "TierError False\n"
    assert names_under(root) == []
