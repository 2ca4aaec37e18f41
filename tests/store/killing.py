"""A process that dies while it writes: `python -m tests.store.killing FOLDER COUNT`.

It runs the same short work once to its end, to list the lines of the store's code that are run, and
then again and again, each time in a folder and a process of its own which ends itself with SIGKILL
in front of one of those lines; and a few times more with a limit on the size of files, at which the
kernel ends it in the middle of a write. Prints one JSON line a death:
{"folder": …, "where": …, "signal": …}.
"""

from __future__ import annotations

import json
import linecache
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import kvrag.store
from kvrag.store.disk import DiskTier
from kvrag.store.tiered import TieredStore, TierSlot

from .helpers import make_block, make_key

_CODE = str(Path(kvrag.store.__file__).resolve().parent)

#: Bytes of a segment; a block is a header and two of them.
SEGMENT_NBYTES = 20_000
BLOCK_NBYTES = make_block(0, segment_nbytes=SEGMENT_NBYTES).nbytes
LIMIT_BYTES = 3 * BLOCK_NBYTES
#: Of the block that is damaged on purpose.
CUT_NBYTES = 5000

#: Instants that are always among the chosen: in front of …
ALWAYS = (
    "victims = self._victims_locked(",  # … the room being reserved
    "self.tier.delete(victim)",
    "os.unlink(name)",
    "os.open(path, flags, 0o600)",
    "fcntl.flock(descriptor",
    "os.writev(",
    "os.fsync(descriptor)",
    "os.replace(temporary",
    "os.close(descriptor)",  # right behind the rename
    "sync_folder(path.parent)",
    "present = self._close_locked(reservation)",
    "os.replace(path, self.folder",
    "self._trim()",
)


def block(name: int, version: int):
    return make_block(name, version=version, segment_nbytes=SEGMENT_NBYTES)


def open_store(folder: Path) -> TieredStore:
    return TieredStore([TierSlot(DiskTier(folder), LIMIT_BYTES)])


def prepare(folder: Path) -> None:
    with DiskTier(folder, fsync=False) as tier:
        for name in range(3):
            tier.put(make_key(name), block(name, 0))


def work(folder: Path) -> None:
    """Puts that evict, replace and need a new folder; a deletion; damage put aside."""
    with open_store(folder) as store:
        for name in (3, 2, 4):
            store.put(make_key(name), block(name, 1))
        store.delete(make_key(3))
        path = next(folder.rglob(f"{make_key(4).digest}.kv"))
        path.write_bytes(path.read_bytes()[:CUT_NBYTES])
        store.open(make_key(4), fingerprint="model-1", token_ids=(1, 2, 3))


def main() -> None:
    root, count = Path(sys.argv[1]), int(sys.argv[2])
    lines = _lines_run(root / "whole")
    for instant in _chosen(lines, count):
        place = f"line {instant} of {len(lines)}: {lines[instant]}"
        _die(root / f"line-{instant}", place, lambda at=instant: _trace(_killer(at)))
    for size in (1, 4096, 4097, 20_000, BLOCK_NBYTES - 1):
        place = f"a write, after {size} bytes"
        _die(root / f"bytes-{size}", place, lambda size=size: _limit_files(size))


def _lines_run(folder: Path) -> list[str]:
    """The text of every line of the store that `work` runs, in order."""
    prepare(folder)
    lines: list[str] = []
    _trace(lambda frame: lines.append(_text(frame)))
    work(folder)
    sys.settrace(None)
    return lines


def _chosen(lines: list[str], count: int) -> list[int]:
    chosen = set()
    for wanted in ALWAYS:
        found = next((index for index, line in enumerate(lines) if wanted in line), None)
        if found is None:
            sys.exit(f"no line that is run has {wanted!r}: tests/store/killing.py is out of date")
        chosen.add(found)
    spread = max(0, count - len(chosen))
    chosen.update(index * len(lines) // spread for index in range(spread))
    return sorted(chosen)


def _die(folder: Path, place: str, arm: Callable[[], None]) -> None:
    child = os.fork()
    if not child:
        prepare(folder)
        arm()
        work(folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    print(json.dumps({"folder": str(folder), "where": place, "signal": died}), flush=True)


def _trace(seen: Callable) -> None:
    """Call `seen(frame)` in front of every line of the store's code."""

    def line(frame, event, argument):
        if event == "line":
            seen(frame)
        return line

    def call(frame, event, argument):
        return line if os.path.realpath(frame.f_code.co_filename).startswith(_CODE) else None

    sys.settrace(call)


def _killer(instant: int) -> Callable:
    left = instant

    def seen(frame) -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    return seen


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def _text(frame) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


if __name__ == "__main__":
    main()
