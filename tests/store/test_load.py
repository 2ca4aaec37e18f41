"""Many threads and processes on one folder, and a long time of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvrag.store.disk import DiskTier
from kvrag.store.tiered import TieredStore, TierSlot

from .helpers import make_block, make_key
from .load import DISK_LIMIT, read
from .test_disk import file_of, names_under


def start(*arguments):
    command = [sys.executable, "-m", "tests.store.load", *map(str, arguments)]
    folder = Path(__file__).parents[2]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    )


def lines_of(process, timeout_s):
    """What it printed. A process that hangs is killed, and fails the test."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.parametrize("acts", [12, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.parametrize(("processes", "threads"), [(1, 32), (4, 8)])
def test_threads_and_processes_on_one_folder(tmp_path, processes, threads, acts):
    """Puts, reads, deletions, evictions and damage: no wrong byte, no hang, and true books."""
    root = tmp_path / "kv"
    started = [start("crowd", root, seed, threads, acts) for seed in range(processes)]
    for process in started:
        (end,) = lines_of(process, 240 + acts)
        assert end == {"healthy": [True, True], "open": 0}
    assert all(name.endswith(".kv") for name in names_under(root))
    with TieredStore([TierSlot(DiskTier(root), DISK_LIMIT)]) as store:
        for name in range(24):
            read(store, name)
        (disk,) = store.stats().tiers
        sizes = [path.stat().st_size for path in (root / "blocks").rglob("*.kv")]
        assert (disk.blocks, disk.nbytes) == (len(sizes), sum(sizes))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell")
@pytest.mark.parametrize("seconds", [60, pytest.param(600, marks=pytest.mark.soak)])
def test_memory_and_descriptors_stay_flat(tmp_path, seconds):
    phases = lines_of(start("endure", tmp_path / "kv", seconds), 240 + 2 * seconds)
    assert len(phases) == 10
    early, late = phases[4], phases[-1]  # by then the limits are reached, and caches are full
    assert late["descriptors"] == early["descriptors"]
    assert late["objects"] < 1.03 * early["objects"], phases
    assert late["resident_kb"] < early["resident_kb"] + 4096, phases


@pytest.mark.soak
def test_a_hundred_thousand_blocks_are_listed_at_the_start(tmp_path):
    """Prints how long it takes; only names and sizes are read, so the files may be empty holes."""
    root, count = tmp_path / "kv", 100_000
    for number in range(count):
        key = make_key(number)
        path = file_of(root, key)
        if number < 10_000:  # by then there are all folders
            path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, 8192)
    begun, cpu = time.perf_counter(), time.process_time()
    tier = DiskTier(root)
    with TieredStore([TierSlot(tier, count * 8192)]) as store:
        print(f"{time.perf_counter() - begun:.2f} s, {time.process_time() - cpu:.2f} s of CPU")
        (disk,) = store.stats().tiers
        assert (disk.blocks, disk.nbytes) == (count, count * 8192)
        block = make_block("new")
        assert store.put(make_key("new"), block).durable
        assert store.stats().tiers[0].evictions == 2
