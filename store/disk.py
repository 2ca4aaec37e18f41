"""Blocks in files, one each, written so that a crash leaves a whole block or none.

Several processes may share a root: what another one writes is found, what it removes is a miss. A
deletion is not made durable: after a power loss a deleted block may be back, whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .block import BlockHeader, decode_header, header_region_nbytes
from .buffers import aligned_buffer
from .errors import BlockFormatError, TierError, TierFullError
from .files import make_folders, sync_folder, write_all
from .header import ALIGNMENT
from .header_cache import HeaderCache
from .layout import Layout, open_temporary, remove_if_abandoned
from .tier import StoredBlock, Tier, check_key, segment_range, split_segments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .block import Block
    from .keys import BlockKey

__all__ = ["DiskTier"]

_QUARANTINE_FILES = 16
_TOUCH_GRAIN_S = 3600.0


class DiskTier(Tier):
    """Blocks under `root`. Segments it returns are in memory of their own.

    The constructor makes the root and removes what a crash left half written. Raises `TierError` if
    the root cannot be used. Nothing is kept in memory of the files but some headers.
    """

    durable = True

    def __init__(self, root: Path | str, name: str = "disk") -> None:
        self.name = name
        self._layout = Layout(Path(root))
        self._headers = HeaderCache()
        self._durable_folders: set[Path] = set()
        self._closed = False
        with self._outages():
            make_folders(self._layout.blocks)
            make_folders(self._layout.quarantine)
            for key, entry in self._layout.walk():
                if key is None:
                    remove_if_abandoned(entry)

    def header(self, key: BlockKey) -> BlockHeader | None:
        with self._opened(key) as descriptor:
            return None if descriptor is None else self._read_header(key, descriptor)

    def segments(self, key: BlockKey, first: int, last: int) -> list[memoryview] | None:
        with self._opened(key) as descriptor:
            if descriptor is None:
                return None
            # Only offsets are taken from a header kept: the bytes are checked by the reader.
            header = self._headers.get(key, os.fstat(descriptor))
            if header is None:
                header = self._read_header(key, descriptor)
            start, end = segment_range(header, first, last)
            return split_segments(header, first, last, _read(descriptor, start, end - start))

    def put(self, key: BlockKey, block: Block) -> None:
        check_key(key, block)
        path = self._layout.path(key)
        with self._outages():
            descriptor, temporary = self._open_temporary(path)
            try:
                write_all(descriptor, [memoryview(block.header_bytes), *block.segments])
                os.fsync(descriptor)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
            sync_folder(path.parent)

    def delete(self, key: BlockKey) -> bool:
        with self._outages():
            return _unlink(self._layout.path(key))

    def contains(self, key: BlockKey) -> bool:
        with self._outages():
            try:
                self._layout.path(key).lstat()
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
        """Move the file aside. The newest 16 are kept, so that a flood cannot fill the disk."""
        folder = self._layout.quarantine
        with self._outages():
            with contextlib.suppress(FileNotFoundError):
                aside = folder / f"{time.time_ns():020d}.{key.tag}.{key.digest}.kv"
                os.replace(self._layout.path(key), aside)
            for old in sorted(os.listdir(folder))[:-_QUARANTINE_FILES]:
                _unlink(folder / old)

    def touch(self, key: BlockKey) -> None:
        """Set the file's modification time, at most once an hour."""
        now_s, path = time.time(), self._layout.path(key)
        with contextlib.suppress(OSError):  # a read-only root serves all the same
            if now_s - path.stat().st_mtime >= _TOUCH_GRAIN_S:
                os.utime(path, (now_s, now_s))

    def close(self) -> None:
        self._closed = True
        self._headers.clear()

    def _statuses(self) -> list[tuple[BlockKey, os.stat_result]]:
        found = []
        with self._outages():
            for key, entry in self._layout.walk():
                if key is not None:
                    with contextlib.suppress(FileNotFoundError):
                        found.append((key, entry.stat(follow_symlinks=False)))
        return found

    @contextlib.contextmanager
    def _outages(self) -> Iterator[None]:
        if self._closed:
            raise TierError(self.name, "it is closed")
        try:
            yield
        except OSError as exc:
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = TierFullError if full else TierError
            raise kind(self.name, exc.strerror or str(exc)) from exc

    @contextlib.contextmanager
    def _opened(self, key: BlockKey) -> Iterator[int | None]:
        with self._outages():
            descriptor = _open(self._layout.path(key))
            try:
                yield descriptor
            finally:
                if descriptor is not None:
                    os.close(descriptor)

    def _read_header(self, key: BlockKey, descriptor: int) -> BlockHeader:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BlockFormatError("what lies in the block's place is no file")
        head = _read(descriptor, 0, ALIGNMENT)
        region = header_region_nbytes(head)
        if region > ALIGNMENT:
            head = _read(descriptor, 0, region)
        header = decode_header(head, expect_key=key)
        if header.nbytes != status.st_size:
            raise BlockFormatError(
                f"the block takes {header.nbytes} bytes, the file has {status.st_size}"
            )
        self._headers.keep(key, status, header)
        return header

    def _open_temporary(self, path: Path) -> tuple[int, Path]:
        for _ in range(2):
            if path.parent not in self._durable_folders:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # Also when it was there: who made it may not have come as far as this.
                sync_folder(path.parent.parent)
                sync_folder(path.parent.parent.parent)
                self._durable_folders.add(path.parent)
            try:
                return open_temporary(path)
            except FileNotFoundError:  # someone removed the folder: it is made once more
                self._durable_folders.discard(path.parent)
        raise TierError(self.name, f"{path.parent} is removed as soon as it is made")


def _open(path: Path) -> int | None:
    """A descriptor to read the file, or None if there is none."""
    try:
        # Not blocking: a pipe laid in a block's place must not hang us.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENXIO):
            raise BlockFormatError("what lies in the block's place is no file") from exc
        raise


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _read(descriptor: int, offset: int, nbytes: int) -> memoryview:
    # What a header announces is never allocated before the file is known to have it.
    if os.fstat(descriptor).st_size < offset + nbytes:
        raise BlockFormatError(f"the file is cut short: {offset + nbytes} bytes are needed")
    data = aligned_buffer(nbytes)
    done = 0
    while done < nbytes:
        try:
            got = os.preadv(descriptor, [data[done:]], offset + done)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            # One bad sector is this block's damage. If the device is dying, quarantine fails too.
            raise BlockFormatError("the device cannot read the file") from exc
        if not got:
            raise BlockFormatError("the file was cut short while it was read")
        done += got
    return data
