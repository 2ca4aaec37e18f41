"""What of a file lies in the page cache, on the file system that the tests run on."""

from __future__ import annotations

import mmap
import os

import pytest

from kvrag.store import residency
from kvrag.store.disk import DiskTier
from kvrag.store.ram import RamTier
from kvrag.store.residency import cached_share
from kvrag.store.tiered import TieredStore, TierSlot

from .helpers import FINGERPRINT, make_block, token_ids

PAGES = 64


def drop(descriptor, offset=0, nbytes=0):
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def told(tmp_path):
    """A descriptor of a written file whose pages can be told and dropped."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * mmap.PAGESIZE))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if cached_share(descriptor, 0, 1) is None:
            pytest.skip("this kernel or file system does not tell what it keeps of a file")
        drop(descriptor)
        if cached_share(descriptor, 0, PAGES * mmap.PAGESIZE):
            pytest.skip("this file system lies in memory")
        yield descriptor
    finally:
        os.close(descriptor)


def test_what_was_read_is_cached_and_looking_reads_nothing(told):
    nbytes = PAGES * mmap.PAGESIZE
    assert [cached_share(told, 0, nbytes) for _ in range(3)] == [0.0] * 3
    os.pread(told, nbytes, 0)
    assert cached_share(told, 0, nbytes) == 1.0
    drop(told, nbytes // 2, nbytes // 2)
    assert 0.3 < cached_share(told, 0, nbytes) < 0.7
    assert cached_share(told, 0, nbytes // 2) == 1.0
    assert cached_share(told, nbytes // 2, nbytes // 2) == 0.0


def test_parts_of_pages_are_looked_at_too(told):
    os.posix_fadvise(told, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
    os.pread(told, 1, 3 * mmap.PAGESIZE + 5)
    assert cached_share(told, 3 * mmap.PAGESIZE + 7, 2) == 1.0
    assert cached_share(told, 2 * mmap.PAGESIZE + 7, 2) == 0.0


def test_what_cannot_be_told_is_none(monkeypatch, tmp_path):
    with (tmp_path / "file").open("wb+") as file:
        descriptor = file.fileno()
        monkeypatch.setattr(residency, "_cachestat", lambda: None)  # as on other platforms
        assert cached_share(descriptor, 0, 1) is None
        monkeypatch.undo()
    assert cached_share(descriptor, 0, 1) is None, "it is closed"


def test_a_disk_tier_knows_what_the_system_keeps_of_it_and_memory_knows_no_such_thing(
    told, tmp_path
):
    block = make_block(1, layers=8, segment_nbytes=8 * mmap.PAGESIZE)
    key, header = block.header.key, block.header
    with DiskTier(tmp_path / "kv") as tier, RamTier() as ram:
        assert tier.cached_share(header) is None, "not there"
        tier.put(key, block)
        ram.put(key, block)
        assert (tier.cached_share(header), ram.cached_share(header)) == (1.0, None)
        path = next((tmp_path / "kv").rglob("*.kv"))
        with path.open("rb") as file:
            drop(file.fileno())
        assert tier.cached_share(header) == 0.0
        with TieredStore([TierSlot(tier)]) as store:
            reader = store.open(key, fingerprint=FINGERPRINT, token_ids=token_ids(1))
            assert reader.cached_share < 0.5, "its header was read"
            before = reader.cached_share
            reader.read(0, 8)
            assert reader.cached_share == before, "as it was before it was read"
            reader.close()
            # A first cold read leaves the page cache alone, a second one does not.
            tier.segments(key, 0, 8)
            assert tier.cached_share(header) == 1.0
        path.unlink()
        path.symlink_to(tmp_path)
        assert tier.cached_share(header) is None
