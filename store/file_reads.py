"""Reading ranges of a block's file, through the page cache or past it.

Direct I/O reads a file that is not cached 1.4 to 2 times as fast, and one that is cached two to
three times slower (docs/benchmarks.md): so what is not cached is read directly, once. What is read
a second time goes through the cache, which thus keeps what is used again and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from .errors import BlockFormatError
from .header import ALIGNMENT
from .residency import cached_share

if TYPE_CHECKING:
    from .buffers import BufferPool

__all__ = ["fill", "memory_for", "read_range", "uncached"]

_MEMORY_NBYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
#: Smaller reads are as fast through the page cache, which reads ahead.
_SMALLEST_DIRECT = 2**17
_DIRECT = getattr(os, "O_DIRECT", 0)  # not every platform has it


def uncached(descriptor: int, offset: int, nbytes: int) -> bool:
    """Whether most of a range that is worth reading directly is not in the page cache.

    False where that cannot be told, or direct I/O needs other places and lengths.
    """
    if not _DIRECT or nbytes < _SMALLEST_DIRECT or offset % ALIGNMENT or nbytes % ALIGNMENT:
        return False
    share = cached_share(descriptor, offset, nbytes)
    return share is not None and share < 0.5


def read_range(
    descriptor: int, offset: int, nbytes: int, buffers: BufferPool, *, direct: bool = False
) -> memoryview:
    """The bytes of the file, in memory from `buffers`. See `memory_for` and `fill`."""
    data = memory_for(descriptor, offset, nbytes, buffers)
    fill(descriptor, offset, data, direct=direct)
    return data


def memory_for(descriptor: int, offset: int, nbytes: int, buffers: BufferPool) -> memoryview:
    """Memory from `buffers` for that range of the file.

    Raises `BlockFormatError` if the file is shorter, and `MemoryError` if there is none at present.
    """
    # What a header announces is never allocated before the file is known to have it.
    if os.fstat(descriptor).st_size < offset + nbytes:
        raise BlockFormatError(f"the file is cut short: {offset + nbytes} bytes are needed")
    try:
        return buffers.take(nbytes)
    except MemoryError as exc:
        if nbytes <= _MEMORY_NBYTES:
            raise  # there is none at the moment, and the block may be sound
        # A file with holes may be of any size and take no room.
        raise BlockFormatError(f"{nbytes} bytes of the block do not fit into memory") from exc


def fill(descriptor: int, offset: int, data: memoryview, *, direct: bool = False) -> None:
    """Read what the file has from `offset` on into all of `data`.

    `direct`: past the page cache, where the file system has that; else through it. Raises
    `BlockFormatError` if the file is shorter or the device cannot read it, and `OSError`.
    """
    direct = direct and _set_flag(descriptor, _DIRECT)
    done = 0
    while done < len(data):
        try:
            got = os.preadv(descriptor, [data[done:]], offset + done)
        except OSError as exc:
            if direct and exc.errno == errno.EINVAL and _set_flag(descriptor, 0):
                # A file system that takes the flag and no such read, or the rest of a short one.
                direct = False
                continue
            if exc.errno != errno.EIO:
                raise
            # One bad sector is this block's damage. If the device is dying, quarantine fails too.
            raise BlockFormatError("the device cannot read the file") from exc
        if not got:
            raise BlockFormatError("the file was cut short while it was read")
        done += got


def _set_flag(descriptor: int, direct: int) -> bool:
    """Whether a descriptor, which nobody else uses, now reads so: some file systems refuse."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct)
    except OSError:
        return False
    return True
