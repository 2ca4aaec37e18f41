"""Blocks in files, one each, written so that a crash leaves a whole block or none.

Several processes may share a root: what another one writes is found, what it removes is a miss. A
deletion is not made durable: after a power loss a deleted block may be back, whole.

What a killed process leaves is whole blocks, whatever `fsync` says. After a power loss, with
`fsync`, every block whose `put` returned is there, whole. Without, a block may be gone or damaged
(cut short, or zeros where its bytes should be): its checksums tell, and it is computed again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from bisect import bisect_right
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from .admission import SecondUse
from .block import BlockHeader, decode_header, header_region_nbytes
from .buffers import BufferPool
from .errors import BlockFormatError, TierError, TierFullError
from .file_reads import fill, memory_for, read_range, uncached
from .files import make_folders, sync_folder, write_all
from .header import ALIGNMENT
from .header_cache import HeaderCache
from .layout import Layout, open_temporary, remove_if_abandoned
from .quarantine import Quarantine
from .residency import cached_share
from .tier import StoredBlock, Tier, check_key, segment_range, split_segments

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .block import Block
    from .keys import BlockKey
    from .tier import Arrived

__all__ = ["DiskTier"]

#: Memory kept for the next reads: what a prompt of 4,096 tokens takes of a small model.
_KEPT_NBYTES = 2**27
#: Headers that the device is asked for at once.
_HEADERS_AT_ONCE = 64
#: Larger files are not read before a sound header says what they are.
_LARGEST_AT_ONCE = 2**26
#: Bytes copied from the page cache at a time and verified before the next ones come: what the
#: processor's cache holds. The best of 0.2 to 3 MB.
_PIECE_NBYTES = 2**20
_TOUCH_GRAIN_S = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_TRIES = 4  # to write while someone removes the folders


class DiskTier(Tier):
    """Blocks under `root`. Segments it returns are in memory of their own.

    The constructor makes the root and removes what a crash left half written. Nothing is kept in
    memory of the files but some headers. `fsync`: whether `put` waits until the device has the
    block. A root that cannot be written is read all the same. Raises `TierError` if the root cannot
    be used.
    """

    durable = True

    def __init__(self, root: Path | str, name: str = "disk", *, fsync: bool = True) -> None:
        self.name = name
        self._fsync = fsync
        self._layout = Layout(Path(root))
        self._quarantine = Quarantine(self._layout.quarantine)
        self._headers = HeaderCache()
        self._read_before = SecondUse()
        self._buffers = BufferPool(_KEPT_NBYTES, huge=True)
        self._durable_folders: set[Path] = set()
        self._closed = False
        with self._outages():
            make_folders(self._layout.blocks, sync=fsync)
            now_s = time.time()
            for key, entry in self._layout.walk():
                if key is None:
                    remove_if_abandoned(entry)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_mtime > now_s:
                        # The clock was set back. Left so, it would seem the newest for as long.
                        _set_time(entry.path, now_s)

    def header(self, key: BlockKey) -> BlockHeader | None:
        with self._opened(key) as descriptor:
            return None if descriptor is None else self._read_header(key, descriptor)

    def headers(self, keys: Sequence[BlockKey]) -> list[BlockHeader | BlockFormatError | None]:
        """See `Tier`. The device is asked for some before the first of them is waited for."""
        found: list[BlockHeader | BlockFormatError | None] = []
        for start in range(0, len(keys), _HEADERS_AT_ONCE):
            some = keys[start : start + _HEADERS_AT_ONCE]
            if len(some) > 1:
                for key in some:
                    self._expect(key)
            found += super().headers(some)
        return found

    def segments(self, key: BlockKey, first: int, last: int) -> list[memoryview] | None:
        with self._opened(key) as descriptor:
            if descriptor is None:
                return None
            # Only offsets are taken from a header kept: the bytes are checked by the reader.
            header = self._headers.get(key, os.fstat(descriptor))
            if header is None:
                header = self._read_header(key, descriptor)
            start, end = segment_range(header, first, last)
            direct = uncached(descriptor, start, end - start) and not (
                self._read_before.again(key, first)
            )
            data = read_range(descriptor, start, end - start, self._buffers, direct=direct)
            return split_segments(header, first, last, data)

    def whole(self, key: BlockKey, arrived: Arrived) -> tuple[BlockHeader, list[memoryview]] | None:
        """See `Tier`. What is not in the page cache is one direct read, header and all."""
        with self._opened(key) as descriptor:
            if descriptor is None:
                return None
            status = _status(descriptor)
            nbytes, header = status.st_size, None
            if nbytes > _LARGEST_AT_ONCE:
                header = self._read_header(key, descriptor)
            direct = uncached(descriptor, 0, nbytes) and not self._read_before.again(key)
            data = memory_for(descriptor, 0, nbytes, self._buffers)
            end = nbytes if direct else min(nbytes, ALIGNMENT + _PIECE_NBYTES)
            fill(descriptor, 0, data[:end], direct=direct)
            if header is None:
                header = self._decoded(key, data[: header_region_nbytes(data)], status)
            count = len(header.segments)
            segments = split_segments(header, 0, count, data[header.header_nbytes :])
            first = 0
            while True:
                last = count if end == nbytes else _whole_before(end, header)
                if first < last:
                    arrived(header, first, segments[first:last])
                if end == nbytes:
                    return header, segments
                first, start, end = last, end, min(nbytes, end + _PIECE_NBYTES)
                fill(descriptor, start, data[start:end])

    def put(self, key: BlockKey, block: Block) -> None:
        check_key(key, block)
        path = self._layout.path(key)
        with self._outages(writing=True):
            descriptor, temporary = self._open_temporary(path)
            try:
                write_all(descriptor, [memoryview(block.header_bytes), *block.segments])
                if self._fsync:
                    os.fsync(descriptor)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
            if self._fsync:
                # A folder that was removed meanwhile took the block along: a miss like any other.
                with contextlib.suppress(FileNotFoundError):
                    sync_folder(path.parent)

    def delete(self, key: BlockKey) -> bool:
        with self._outages(writing=True):
            return _unlink(self._layout.name(key))

    def contains(self, key: BlockKey) -> bool:
        with self._outages():
            try:
                os.lstat(self._layout.name(key))
            except FileNotFoundError:
                return False
        return True

    def keys(self, tag: str | None = None) -> Iterator[BlockKey]:
        with self._outages():
            return iter([key for key, _ in self._layout.walk(tag) if key is not None])

    def entries(self) -> list[StoredBlock]:
        now_s = time.time()
        by_age = sorted(self._statuses(), key=lambda found: found[1].st_mtime)
        return [
            StoredBlock(key, status.st_size, max(0.0, now_s - status.st_mtime))
            for key, status in by_age
        ]

    @property
    def nbytes(self) -> int:
        """Sum of the sizes of the encoded blocks held: looks at every file."""
        return sum(status.st_size for _, status in self._statuses())

    def quarantine(self, key: BlockKey) -> None:
        """Move the file aside: see `Quarantine` for how many are kept."""
        with self._outages(writing=True):
            self._quarantine.take(self._layout.path(key), key)

    def touch(self, key: BlockKey) -> None:
        """Set the file's modification time, at most once a minute."""
        now_s, name = time.time(), self._layout.name(key)
        with contextlib.suppress(OSError):
            # Below 0 the clock was set back, and what the file says must be corrected.
            if not 0 <= now_s - os.lstat(name).st_mtime < _TOUCH_GRAIN_S:
                _set_time(name, now_s)

    def cached_share(self, header: BlockHeader) -> float | None:
        """See `Tier`: what of it the page cache holds."""
        try:
            descriptor = _open(self._layout.name(header.key))
        except (OSError, BlockFormatError):
            return None
        if descriptor is None:
            return None
        try:
            return cached_share(descriptor, 0, header.nbytes)
        finally:
            os.close(descriptor)

    def idle_s(self, key: BlockKey) -> float | None:
        """To the minute, see `touch`."""
        with self._outages():
            try:
                return max(0.0, time.time() - os.lstat(self._layout.name(key)).st_mtime)
            except FileNotFoundError:
                return None

    def close(self) -> None:
        self._closed = True
        self._headers.clear()
        self._buffers.clear()

    def _statuses(self) -> list[tuple[BlockKey, os.stat_result]]:
        found = []
        with self._outages():
            for key, entry in self._layout.walk():
                if key is not None:
                    with contextlib.suppress(FileNotFoundError):
                        found.append((key, entry.stat(follow_symlinks=False)))
        return found

    @contextlib.contextmanager
    def _outages(self, *, writing: bool = False) -> Iterator[None]:
        if self._closed:
            raise TierError(self.name, "it is closed")
        try:
            yield
        except OSError as exc:
            refused = exc.errno in _FULL or (writing and exc.errno in _READ_ONLY)
            kind = TierFullError if refused else TierError
            raise kind(self.name, exc.strerror or str(exc)) from exc

    @contextlib.contextmanager
    def _opened(self, key: BlockKey) -> Iterator[int | None]:
        with self._outages():
            descriptor = _open(self._layout.name(key))
            try:
                yield descriptor
            finally:
                if descriptor is not None:
                    os.close(descriptor)

    def _expect(self, key: BlockKey) -> None:
        """Have the header come into the page cache meanwhile, if it can be had."""
        with contextlib.suppress(TierError, BlockFormatError), self._opened(key) as descriptor:
            if descriptor is not None and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, ALIGNMENT, os.POSIX_FADV_WILLNEED)

    def _read_header(self, key: BlockKey, descriptor: int) -> BlockHeader:
        status = _status(descriptor)
        head = read_range(descriptor, 0, ALIGNMENT, self._buffers)
        region = header_region_nbytes(head)
        if region > ALIGNMENT:
            head = read_range(descriptor, 0, region, self._buffers)
        return self._decoded(key, head, status)

    def _decoded(self, key: BlockKey, region: memoryview, status: os.stat_result) -> BlockHeader:
        """The header of those bytes, which are checked, and the file's size with them."""
        region_bytes = region.tobytes()
        header = self._headers.decoded(key, region_bytes) or decode_header(
            region_bytes, expect_key=key
        )
        if header.nbytes != status.st_size:
            raise BlockFormatError(
                f"the block takes {header.nbytes} bytes, the file has {status.st_size}"
            )
        self._headers.keep(key, status, region_bytes, header)
        return header

    def _open_temporary(self, path: Path) -> tuple[int, Path]:
        for _ in range(_TRIES):
            try:
                self._make_durable(path.parent)
                return open_temporary(path)
            except FileNotFoundError:  # someone removed a folder: it is made once more
                self._durable_folders.discard(path.parent)
        raise TierError(self.name, f"{path.parent} is removed as soon as it is made")

    def _make_durable(self, folder: Path) -> None:
        if folder in self._durable_folders:
            return
        make_folders(folder, sync=self._fsync)
        if self._fsync:
            # Also when it was there: who made it may not have come as far as this.
            sync_folder(folder.parent)
            sync_folder(folder.parent.parent)
        self._durable_folders.add(folder)


def _open(name: str) -> int | None:
    """A descriptor to read the file, or None if there is none."""
    try:
        # Not blocking: a pipe laid in a block's place must not hang us.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO):
            raise BlockFormatError("what lies in the block's place is no file") from exc
        raise


def _status(descriptor: int) -> os.stat_result:
    """Raises `BlockFormatError` unless it is a file."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise BlockFormatError("what lies in the block's place is no file")
    return status


def _whole_before(end: int, header: BlockHeader) -> int:
    """How many segments lie in the first `end` bytes, which are not all of the block."""
    # Each ends where the next one starts.
    return bisect_right(header.segments, end, key=attrgetter("offset")) - 1


def _set_time(name: str, now_s: float) -> None:
    with contextlib.suppress(OSError):  # a read-only root serves all the same
        os.utime(name, (now_s, now_s), follow_symlinks=False)


def _unlink(name: str) -> bool:
    try:
        os.unlink(name)
    except FileNotFoundError:
        return False
    return True
