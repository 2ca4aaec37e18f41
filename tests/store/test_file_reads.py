"""Direct I/O: what is cold is read past the page cache once, and everything reads the same."""

from __future__ import annotations

import errno
import fcntl
import os
import tracemalloc

import pytest

from kvrag.store import file_reads
from kvrag.store.buffers import BufferPool
from kvrag.store.disk import DiskTier
from kvrag.store.errors import BlockFormatError
from kvrag.store.file_reads import read_range, uncached
from kvrag.store.residency import cached_share

from .helpers import make_block, make_key

NBYTES = 2**20


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(NBYTES))
    return path


@pytest.fixture
def descriptor(file):
    descriptor = os.open(file, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def drop(path):
    """Skips where the page cache cannot be dropped or asked, or direct I/O is refused."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_share(descriptor, 0, os.fstat(descriptor).st_size) != 0:
            pytest.skip("the page cache of this folder cannot be dropped or asked")
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("the file system of this folder has no direct I/O")
    finally:
        os.close(descriptor)


def test_cold_is_told_from_cached(file, descriptor):
    drop(file)
    assert uncached(descriptor, 0, NBYTES)
    assert not uncached(descriptor, 0, 4096)  # too small to gain anything
    assert not uncached(descriptor, 100, NBYTES - 4096)  # no place for direct I/O
    file.read_bytes()
    assert not uncached(descriptor, 0, NBYTES)


@pytest.mark.parametrize("direct", [False, True])
def test_both_ways_bring_the_same_bytes(file, descriptor, direct):
    data = read_range(descriptor, 4096, NBYTES - 8192, BufferPool(0), direct=direct)
    assert bytes(data) == file.read_bytes()[4096:-4096]
    with pytest.raises(BlockFormatError, match="cut short"):
        read_range(descriptor, 4096, NBYTES, BufferPool(0), direct=direct)


def test_direct_reads_leave_the_page_cache_alone(file, descriptor):
    drop(file)
    read_range(descriptor, 0, NBYTES, BufferPool(0), direct=True)
    assert cached_share(descriptor, 0, NBYTES) == 0


def test_a_file_system_that_refuses_direct_reads_is_read_all_the_same(
    file, descriptor, monkeypatch
):
    real = os.preadv

    def refusing(number, *arguments):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(number, *arguments)

    monkeypatch.setattr(os, "preadv", refusing)
    assert bytes(read_range(descriptor, 0, NBYTES, BufferPool(0), direct=True)) == file.read_bytes()

    flags = fcntl.fcntl

    def no_flag(number, command, *arguments):
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return flags(number, command, *arguments)

    monkeypatch.setattr(file_reads.fcntl, "fcntl", no_flag)
    monkeypatch.setattr(os, "preadv", real)
    assert bytes(read_range(descriptor, 0, NBYTES, BufferPool(0), direct=True)) == file.read_bytes()


@pytest.fixture
def reads(monkeypatch):
    """(whether it is direct, offset, bytes) of every read."""
    real, seen = os.preadv, []

    def noting(number, views, offset):
        direct = bool(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT)
        seen.append((direct, offset, len(views[0])))
        return real(number, views, offset)

    monkeypatch.setattr(os, "preadv", noting)
    return seen


def test_a_cold_block_is_one_direct_read_header_and_all(tmp_path, reads):
    """The header came first, by a read of its own: a device's latency more."""
    block = make_block(1, layers=12, segment_nbytes=2**18)
    with DiskTier(tmp_path) as tier:
        tier.put(make_key(1), block)
    with DiskTier(tmp_path) as tier:
        (path,) = (tmp_path / "blocks").rglob("*.kv")
        drop(path)
        tier.whole(make_key(1), lambda *_: None)
        assert reads == [(True, 0, block.nbytes)]
        # A second time it goes through the page cache, and is handed on piece by piece.
        reads.clear()
        pieces = []
        tier.whole(make_key(1), lambda _, first, views: pieces.append((first, len(views))))
        assert not any(direct for direct, *_ in reads)
        assert pieces == [(0, 4), (4, 4), (8, 4)]


def test_a_large_file_is_not_read_before_it_has_a_header(tmp_path):
    """Its size is all that is known of it, and a file with holes may be of any size."""
    with DiskTier(tmp_path) as tier:
        tier.put(make_key(1), make_block(1))
        (path,) = (tmp_path / "blocks").rglob("*.kv")
        os.truncate(path, 0)
        os.truncate(path, 2**36)
        drop(path)
        tracemalloc.start()
        try:
            with pytest.raises(BlockFormatError, match="do not start as a block"):
                tier.whole(make_key(1), lambda *_: None)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 2**24


def test_headers_of_many_cold_blocks(tmp_path):
    blocks = {name: make_block(name, segment_nbytes=200_000) for name in range(70)}
    with DiskTier(tmp_path, fsync=False) as tier:
        for name, block in blocks.items():
            tier.put(make_key(name), block)
        for path in (tmp_path / "blocks").rglob("*.kv"):
            drop(path)
    with DiskTier(tmp_path) as tier:
        found = tier.headers([make_key(name) for name in range(71)])
    assert found == [*(block.header for block in blocks.values()), None]


def test_what_is_read_a_second_time_enters_the_page_cache(tmp_path):
    """Otherwise a block that memory has no room for would come from the device for ever."""
    block = make_block(1, layers=4, segment_nbytes=2**18)
    with DiskTier(tmp_path) as tier:
        tier.put(make_key(1), block)
        (path,) = (tmp_path / "blocks").rglob("*.kv")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            shares = []
            for _ in range(2):
                drop(path)
                for first, last in ((0, 1), (1, 4)):
                    assert tier.segments(make_key(1), first, last) == list(
                        block.segments[first:last]
                    )
                shares.append(cached_share(descriptor, 4096, 4 * 2**18))
        finally:
            os.close(descriptor)
    assert shares == [0, 1]
