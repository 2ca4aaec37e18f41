"""The disk tier against what the device delivers to plain calls.

Reading: `pread` with `O_DIRECT` over one file that holds as many bytes, a block's at a time, one
after the other and four at a time; fio does the same where it is installed. Into memory as
everybody gets it, which is the baseline, and into huge pages, which our tier reads into and which
so are its bound. Ours is a store just opened, as after a restart, whose files' pages were dropped
from the page cache (and are looked at whether they were): opened, read, verified, one block after
the other and four at a time.

Writing: one file's bytes by plain calls, with `fsync` and without, as `dd conv=fsync` does.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from kvrag.bench.frame import median
from kvrag.bench.store.options import (
    Row,
    Section,
    Skipped,
    StoreOptions,
    Target,
    check,
    get,
    make_blocks,
)
from kvrag.bench.store.turns import in_turns, ratio, timed
from kvrag.fusion.stream import IoThreads
from kvrag.store.block import Block, encode_header
from kvrag.store.buffers import aligned_buffer
from kvrag.store.disk import DiskTier
from kvrag.store.files import write_all
from kvrag.store.keys import BlockKey
from kvrag.store.residency import cached_share
from kvrag.store.tiered import TieredStore, TierSlot

__all__ = [
    "disk_section",
    "drop_pages",
    "get_from_disk",
    "lay_out",
    "put_to_disk",
    "read_verified",
    "write_plain",
]

IN_FLIGHT = 4
#: Layers read before their checksums are taken: about a MiB was fastest.
_LAYERS_A_PIECE = 5
_FIO_TIMEOUT_S = 600
_ENGINES = {1: "psync", IN_FLIGHT: "libaio"}


def disk_section(options: StoreOptions) -> Section:
    """Measure it.

    Raises:
        Skipped: the folder has no direct I/O or no page cache that can be dropped.
    """
    with tempfile.TemporaryDirectory(prefix="kvrag-bench-", dir=options.folder) as name:
        folder = Path(name)
        blocks = make_blocks(options)
        whole = folder / "plain"
        write_plain(whole, blocks)
        _check_direct(whole)
        lay_out(folder / "read", blocks)
        fio = _Fio(whole, options)
        contestants: dict[str, Callable[[], float]] = {
            "direct": partial(_direct, whole, options, 1),
            "get": partial(get_from_disk, folder / "read", blocks, 1),
            "direct_4": partial(_direct, whole, options, IN_FLIGHT),
            "get_4": partial(get_from_disk, folder / "read", blocks, IN_FLIGHT),
            "direct_huge": partial(_direct, whole, options, 1, huge=True),
            "direct_huge_4": partial(_direct, whole, options, IN_FLIGHT, huge=True),
            "get_cached": partial(get_from_disk, folder / "read", blocks, 1, cold=False),
            "read_cached": partial(read_verified, whole, options),
            **fio.contestants,
            "write": partial(_write_each, folder, blocks, sync=False),
            "put": partial(put_to_disk, folder / "write", blocks, fsync=False),
            "write_fsync": partial(_write_each, folder, blocks, sync=True),
            "put_fsync": partial(put_to_disk, folder / "fsync", blocks, fsync=True),
        }
        taken = in_turns(contestants, options.repetitions)
    return _section(taken, options, fio.reason)


def drop_pages(folder: Path) -> None:
    """Drop what the page cache holds of all files in a folder.

    Raises:
        Skipped: it stays, as on tmpfs, or nobody can tell.
    """
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        with _descriptor(path, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)  # what is not written yet stays
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            nbytes = os.fstat(descriptor).st_size
            share = cached_share(descriptor, 0, nbytes) if nbytes else 0.0
        if share is None:
            raise Skipped(f"{folder}: the system does not tell what its page cache holds")
        if share:
            raise Skipped(f"{folder}: its pages cannot be dropped from memory, as on tmpfs")


def _section(taken: dict[str, list[float]], options: StoreOptions, no_fio: str | None) -> Section:
    ms = {name: median([1e3 * s / options.blocks for s in of]) for name, of in taken.items()}
    gb_s = {name: median([options.nbytes / of / 1e6]) for name, of in ms.items()}
    of = {
        "of_direct": ratio(taken["direct"], taken["get"]),
        "of_direct_4": ratio(taken["direct_4"], taken["get_4"]),
        "of_direct_huge": ratio(taken["direct_huge"], taken["get"]),
        "of_direct_huge_4": ratio(taken["direct_huge_4"], taken["get_4"]),
        "in_flight_of_direct": ratio(taken["direct"], taken["get_4"]),
        "cached_of_read": ratio(taken["read_cached"], taken["get_cached"]),
        "put_of_write": ratio(taken["write"], taken["put"]),
        "put_fsync_of_write": ratio(taken["write_fsync"], taken["put_fsync"]),
    }
    relations = {
        "get": f"{of['of_direct']:.0%} of one direct read at a time",
        "get_4": f"{of['of_direct_4']:.0%} of {IN_FLIGHT} direct reads at a time, "
        f"{of['in_flight_of_direct']:.0%} of one",
        "direct_huge": f"a get is {of['of_direct_huge']:.0%} of it",
        "direct_huge_4": f"{IN_FLIGHT} gets are {of['of_direct_huge_4']:.0%} of it",
        "get_cached": f"{of['cached_of_read']:.0%} of a plain read and xxh3",
        "put": f"{of['put_of_write']:.0%} of plain writes",
        "put_fsync": f"{of['put_fsync_of_write']:.0%} of plain writes, fsync",
    }
    figures: dict[str, Any] = {"ms": ms, "gb_s": gb_s, **of}
    if no_fio is not None:
        figures["fio_skipped"] = no_fio
    rows = [Row(_NAMES[name], ms[name], gb_s[name], relations.get(name, "")) for name in ms]
    if no_fio is not None:
        rows.append(Row("fio", relation=f"skipped: {no_fio}"))
    targets = (
        Target("disk.of_direct", of["of_direct"], 0.8),
        Target("disk.of_direct_4", of["of_direct_4"], 0.9),
    )
    return Section(figures, tuple(rows), targets)


_NAMES = {
    "direct": "direct reads",
    "direct_4": f"direct reads, {IN_FLIGHT} at a time",
    "direct_huge": "direct reads, huge pages",
    "direct_huge_4": f"direct reads, huge pages, {IN_FLIGHT} at a time",
    "fio": "fio, direct reads",
    "fio_4": f"fio, direct reads, {IN_FLIGHT} at a time",
    "get": "get, cold, verified",
    "get_4": f"get, cold, {IN_FLIGHT} at a time",
    "get_cached": "get, page cache",
    "read_cached": "plain read and xxh3, page cache",
    "write": "plain writes",
    "put": "put, disk_fsync never",
    "write_fsync": "plain writes, fsync",
    "put_fsync": "put, disk_fsync always",
}


# ---- reading -------------------------------------------------------------------------------------


def _check_direct(path: Path) -> None:
    try:
        with _descriptor(path, os.O_RDONLY | os.O_DIRECT) as descriptor:
            os.preadv(descriptor, [aligned_buffer(4096)], 0)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        raise Skipped(f"{path.parent}: its file system has no direct I/O") from exc


def _direct(path: Path, options: StoreOptions, width: int, *, huge: bool = False) -> float:
    """Seconds to read the file, a block's bytes a call, `width` calls at a time."""
    buffers = _touched(options, huge=huge)
    with _descriptor(path, os.O_RDONLY | os.O_DIRECT) as descriptor:

        def read(number: int) -> None:
            done = 0
            while done < options.nbytes:
                view = buffers[number][done:]
                done += os.preadv(descriptor, [view], number * options.nbytes + done)

        return _side_by_side([partial(read, number) for number in range(options.blocks)], width)


def get_from_disk(folder: Path, blocks: Sequence[Block], width: int, *, cold: bool = True) -> float:
    """Seconds to get all blocks, `width` at a time, from a store that has not read them before.

    It has read them under other keys, and so has the memory for them.
    """
    brought: dict[int, list[memoryview]] = {}
    with _store(folder) as store:
        others = [get(store, _twin(block)) for block in blocks]
        del others
        if cold:
            drop_pages(folder)
        else:
            for path in folder.rglob("*.kv"):
                path.read_bytes()

        def read(number: int) -> None:
            brought[number] = get(store, blocks[number])

        seconds = _side_by_side([partial(read, n) for n in range(len(blocks))], width)
    for number, block in enumerate(blocks):
        check(brought[number], block)
    return seconds


def _touched(options: StoreOptions, *, huge: bool = False) -> list[memoryview]:
    """Memory for every block, which the system gives only when it is touched."""
    buffers = [aligned_buffer(options.nbytes, huge=huge) for _ in range(options.blocks)]
    for buffer in buffers:
        buffer[:] = bytes(options.nbytes)
    return buffers


def read_verified(path: Path, options: StoreOptions) -> float:
    """Seconds to read the file from the page cache, and take the checksum of each layer."""
    path.read_bytes()
    buffers = _touched(options)
    layer, piece = options.layer_nbytes, _LAYERS_A_PIECE * options.layer_nbytes
    with _descriptor(path, os.O_RDONLY) as descriptor:

        def read() -> None:
            for number in range(options.blocks):
                for start in range(0, options.nbytes, piece):
                    view = buffers[number][start : start + piece]
                    os.preadv(descriptor, [view], number * options.nbytes + start)
                    for place in range(0, len(view), layer):  # while it lies in a near cache
                        xxhash.xxh3_64_intdigest(view[place : place + layer])

        return timed(read)


def lay_out(folder: Path, blocks: Sequence[Block]) -> None:
    """Put the blocks, and each under another key."""
    with _store(folder) as store:
        for block in blocks:
            for one in (block, _twin(block)):
                store.put(one.header.key, one)
                check(get(store, one), one)


def _twin(block: Block) -> Block:
    """The same block under another key."""
    key = block.header.key
    header = replace(block.header, key=BlockKey(key.tag, key.digest[::-1]))
    return Block(header, encode_header(header), block.segments)


def _side_by_side(work: Sequence[Callable[[], None]], width: int) -> float:
    """Seconds until all is done, at most `width` at a time, in threads as a request's are."""
    if width == 1:
        return timed(lambda: [one() for one in work])
    threads = IoThreads()
    threads.join()
    left, lock, done = len(work), threading.Lock(), threading.Event()
    failures: list[BaseException] = []

    def run(one: Callable[[], None]) -> None:
        nonlocal left
        try:
            one()
        except BaseException as exc:
            failures.append(exc)
        with lock:
            left -= 1
            if not left:
                done.set()

    def all_of_it() -> None:
        threads.submit("bench", [partial(run, one) for one in work], width=width)
        done.wait()

    try:
        seconds = timed(all_of_it)
    finally:
        threads.leave()
    if failures:
        raise failures[0]
    return seconds


class _Fio:
    """fio over the same file, if it is installed; else the `reason` why it is not asked."""

    def __init__(self, path: Path, options: StoreOptions) -> None:
        self._path, self._options = path, options
        self._program = shutil.which("fio")
        self.reason = None if self._program else "fio is not installed"

    @property
    def contestants(self) -> dict[str, Callable[[], float]]:
        if self._program is None:
            return {}
        return {"fio": partial(self._seconds, 1), "fio_4": partial(self._seconds, IN_FLIGHT)}

    def _seconds(self, depth: int) -> float:
        nbytes = self._options.nbytes
        command = [
            str(self._program),
            *("--name=kvrag", f"--filename={self._path}", "--readonly", "--rw=read", "--direct=1"),
            *(f"--bs={nbytes}", f"--size={nbytes * self._options.blocks}", "--thread"),
            *(f"--ioengine={_ENGINES[depth]}", f"--iodepth={depth}"),
            "--output-format=json",
        ]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=_FIO_TIMEOUT_S, check=False
        )
        try:
            read = json.loads(run.stdout)["jobs"][0]["read"]
            return float(nbytes * self._options.blocks / read["bw_bytes"])
        except (ValueError, LookupError, TypeError, ZeroDivisionError) as exc:
            raise Skipped(f"fio failed: {run.stderr.strip()[-200:]}") from exc


# ---- writing -------------------------------------------------------------------------------------


def put_to_disk(folder: Path, blocks: Sequence[Block], *, fsync: bool) -> float:
    with _store(folder, fsync=fsync) as store:
        for block in blocks:
            store.delete(block.header.key)
        seconds = timed(lambda: [store.put(block.header.key, block) for block in blocks])
    drop_pages(folder)  # or the next one's reads wait for what is still being written
    return seconds


def write_plain(path: Path, blocks: Sequence[Block]) -> None:
    """All blocks' layers as one file."""
    _write(path, [view for block in blocks for view in block.segments], sync=True)


def _write_each(folder: Path, blocks: Sequence[Block], *, sync: bool) -> float:
    paths = [folder / f"written-{number}" for number in range(len(blocks))]
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()

    def write() -> None:
        for path, block in zip(paths, blocks, strict=True):
            _write(path, list(block.segments), sync=sync)

    seconds = timed(write)
    for path in paths:
        with _descriptor(path, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)
    return seconds


def _write(path: Path, views: list[memoryview], *, sync: bool) -> None:
    with _descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        write_all(descriptor, views)
        if sync:
            os.fsync(descriptor)


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _store(folder: Path, *, fsync: bool = False) -> TieredStore:
    return TieredStore([TierSlot(DiskTier(folder, fsync=fsync))])
