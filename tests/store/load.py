"""Random use of a store in one folder, in a process of its own: `python -m tests.store.load …`.

Whatever is read is compared with what was put. Used by the tests of several processes and of
endurance; `main` says what is printed.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from pathlib import Path

from kvrag.store.disk import DiskTier
from kvrag.store.errors import DamagedBlockError
from kvrag.store.ram import RamTier
from kvrag.store.tiered import TieredStore, TierSlot

from .doubles import in_threads
from .helpers import FINGERPRINT, make_block, make_key, token_ids

VERSIONS = 2
NBYTES = make_block(0).nbytes
RAM_LIMIT = 4 * NBYTES
DISK_LIMIT = 16 * NBYTES


def open_store(root: Path) -> TieredStore:
    """Without fsync: what is tried here does not depend on it, and takes a tenth of the time."""
    slots = [TierSlot(RamTier(), RAM_LIMIT), TierSlot(DiskTier(root, fsync=False), DISK_LIMIT)]
    return TieredStore(slots)


def use(store: TieredStore, root: Path, rng: random.Random, names: range) -> None:
    """One random act. Raises `AssertionError` for any byte that was never put."""
    name = rng.choice(names)
    key = make_key(name)
    act = rng.random()
    if act < 0.4:
        store.put(key, make_block(name, version=rng.randrange(VERSIONS)))
    elif act < 0.9:
        read(store, name)
    elif act < 0.95:
        store.delete(key)
    else:
        damage(root / "blocks" / key.tag / key.digest[:2] / f"{key.digest}.kv", rng)


def read(store: TieredStore, name: int) -> None:
    reader = store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))
    if reader is None:
        return
    with reader:
        try:
            found = reader.read(0, 1) + reader.read(1, 2)
        except DamagedBlockError:  # damaged, deleted or evicted meanwhile
            return
    known = [list(make_block(name, version=version).segments) for version in range(VERSIONS)]
    assert found in known, f"block {name} came back wrong"


def damage(path: Path, rng: random.Random) -> None:
    """Flip a bit of the file, or cut it short."""
    try:
        with path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            at = rng.randrange(max(1, size))
            if rng.random() < 0.3:
                file.truncate(at)
                return
            byte = os.pread(file.fileno(), 1, at)
            if byte:
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << rng.randrange(8)]), at)
    except FileNotFoundError:
        return


def measure() -> dict[str, int]:
    """What must not grow, while nothing runs."""
    gc.collect()
    status = Path("/proc/self/status").read_text().splitlines()
    (resident,) = (line for line in status if line.startswith("VmRSS"))
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
        "resident_kb": int(resident.split()[1]),
    }


def crowd(root: Path, seed: int, threads: int, acts: int) -> None:
    """`threads` use few blocks at once."""
    with open_store(root) as store:

        def work(index: int) -> None:
            rng = random.Random(f"{seed} {index}")
            for _ in range(acts):
                use(store, root, rng, range(24))

        in_threads(threads, work)
        stats = store.stats()
        healthy = [tier.healthy for tier in stats.tiers]
        print(json.dumps({"healthy": healthy, "open": stats.open_blocks}))


def endure(root: Path, seconds: float) -> None:
    """Ever new blocks, in two threads; a line of `measure` every tenth of the time."""
    with open_store(root) as store:
        for phase in range(10):
            end = time.monotonic() + seconds / 10

            def work(index: int, phase: int = phase, end: float = end) -> None:
                rng = random.Random(f"{phase} {index}")
                first = 10**6 * phase
                while time.monotonic() < end:
                    use(store, root, rng, range(first, first + 40))
                    first += 1

            in_threads(2, work)
            stats = store.stats()
            assert stats.open_blocks == 0
            assert all(tier.nbytes <= tier.limit_bytes for tier in stats.tiers)
            print(json.dumps(measure()), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "crowd":
        crowd(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        endure(Path(sys.argv[2]), float(sys.argv[3]))
