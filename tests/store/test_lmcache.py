"""Why there is no tier on a running `lmcache server`: each reason of docs/lmcache.md, observed.

A test that fails here says that LMCache has changed, and that the page must be thought over.

LMCache cannot be installed beside kvrag (its last reason), so these run only where TESTS_LMCACHE
names a virtual environment that has it:

    python -m venv lmcache && lmcache/bin/pip install lmcache==0.5.6 && TESTS_LMCACHE=lmcache …
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from packaging.requirements import Requirement

from .helpers import make_block, whole_bytes

ROOT = Path(__file__).parents[2]
# Absolute before any test changes the working directory.
_ENVIRONMENT = os.environ.get("TESTS_LMCACHE") and Path(os.environ["TESTS_LMCACHE"]).absolute()
_MEMORY_GIB = 0.125

pytestmark = [
    pytest.mark.skipif(
        not _ENVIRONMENT, reason="TESTS_LMCACHE names no virtual environment with LMCache"
    ),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def lmcache() -> Path:
    return Path(_ENVIRONMENT, "bin")


@pytest.fixture(scope="module")
def seen(lmcache, tmp_path_factory) -> dict:
    """What the probe saw of a server that has memory, a file system, and no engine."""
    folder = tmp_path_factory.mktemp("lmcache")
    files = []
    for version in range(2):
        files.append(folder / f"block{version}")
        files[-1].write_bytes(whole_bytes(make_block(1, version=version, segment_nbytes=100_000)))
    port, http_port = _free_port(), _free_port()
    # Neither of the first two options is a default: see the page.
    options = {
        "--supported-transfer-mode": "engine_driven",
        "--shm-name": f"kvrag_test_{os.getpid()}",
        "--l1-size-gb": _MEMORY_GIB,
        "--eviction-policy": "LRU",
        "--host": "127.0.0.1",
        "--port": port,
        "--http-port": http_port,
        "--l2-adapter": json.dumps({"type": "fs", "base_path": str(folder / "files")}),
    }
    command = [str(text) for pair in options.items() for text in pair]
    environment = os.environ | {"LMCACHE_TRACK_USAGE": "false", "HOME": str(folder)}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [lmcache / "lmcache", "server", *command, "--disable-metrics"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        http_url = f"http://127.0.0.1:{http_port}"
        _wait_for(f"{http_url}/config", server, folder / "server.log")
        probe = subprocess.run(
            [
                lmcache / "python",
                Path(__file__).with_name("lmcache_probe.py"),
                f"tcp://127.0.0.1:{port}",
                http_url,
                str(round(_MEMORY_GIB * 2**30)),
                *files,
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        server.terminate()
        server.wait(30)
    assert probe.returncode == 0, probe.stderr
    return json.loads(probe.stdout.splitlines()[-1])


def test_it_cannot_be_installed_beside_kvrag(lmcache):
    """It does not allow the NumPy that kvrag is tested with."""
    listing = subprocess.run(
        [
            lmcache / "python",
            "-c",
            "import importlib.metadata as m; print(*m.requires('lmcache'), sep='\\n')",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    wanted = {need.name: need for need in map(Requirement, listing.stdout.splitlines())}
    assert pins["numpy"] not in wanted["numpy"].specifier
    assert {"cupy-cuda13x", "cuda-python"} <= wanted.keys()


def test_the_public_client_wants_an_engine(seen):
    assert "no registered GPU layout" in seen["public_client"]


def test_the_internal_client_carries_a_block(seen):
    """Bytes are not what is in the way: a block comes back as it was put."""
    assert seen["absent"]
    assert seen["put"] == {"slots": 1, "committed": True}
    assert seen["carried"]


def test_a_second_put_changes_nothing(seen):
    assert seen["put_again"] == {"slots": 0, "committed": None}
    assert seen["after_put_again"] == "first"


def test_a_put_that_does_not_fit_is_answered_like_one_that_is_there(seen):
    """The same answer as to the second put: who writes cannot tell whether the block is kept."""
    assert seen["too_large_absent"]
    assert seen["put_too_large"] == seen["put_again"]


def test_blocks_cannot_be_listed(seen):
    """Neither what lies in memory (not offered), nor in files (that adapter cannot)."""
    assert seen["listed"] == {"l1": 400, "l2": 503}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-5000:]
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"no answer from {url}:\n{log.read_text()[-5000:]}")
