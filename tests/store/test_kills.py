"""A writer killed at a chosen instant: every block is whole or absent, and all space is accounted.

`test_disk.py` kills at random instants, which also fall into system calls.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import FINGERPRINT, make_key, token_ids
from .killing import CUT_NBYTES, LIMIT_BYTES, block, open_store


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_killed_at_any_instant(tmp_path, count):
    process = subprocess.run(
        [sys.executable, "-m", "tests.store.killing", tmp_path, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    deaths = [json.loads(line) for line in process.stdout.splitlines()]
    assert sum(death["signal"] == signal.SIGKILL for death in deaths) >= count - 1
    assert sum(death["signal"] == signal.SIGXFSZ for death in deaths) == 5
    for death in deaths:
        assert death["signal"], f"not killed: {death['where']}"
        check(Path(death["folder"]), death["where"])


def check(folder, where):
    # The one half block that `work` itself leaves on purpose.
    cut = [path for path in (folder / "blocks").rglob("*.kv") if path.stat().st_size == CUT_NBYTES]
    with open_store(folder) as store:
        found = {name: read(store, name) for name in range(5)}
        stored = {path.name: path.stat() for path in (folder / "blocks").rglob("*.*")}
        (disk,) = store.stats().tiers
        assert all(name.endswith(".kv") for name in stored), f"left over: {where}"
        assert disk.nbytes == sum(status.st_size for status in stored.values()), where
        assert disk.blocks == len(stored) == sum(map(bool, found.values())), where
        assert disk.nbytes <= LIMIT_BYTES, where
        assert disk.damaged == len(cut), where
        assert disk.errors == 0
        for name, segments in found.items():
            versions = {0: (0,), 1: (0,), 2: (0, 1), 3: (1,), 4: (1,)}[name]
            known = [list(block(name, version).segments) for version in versions]
            assert segments is None or segments in known, f"block {name}: {where}"
        assert store.put(make_key("new"), block("new", 0)).durable, where
    on_disk = sum(path.stat().st_size for path in (folder / "blocks").rglob("*.kv"))
    assert on_disk <= LIMIT_BYTES, where


def read(store, name):
    reader = store.open(make_key(name), fingerprint=FINGERPRINT, token_ids=token_ids(name))
    if reader is None:
        return None
    with reader:
        return reader.read(0, 2)
