"""Runs a page's blocks: shell by bash, snippets of Python in one process, both on a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from .pages import ROOT, Block
from .zygote import MESSAGE

_HERE = Path(__file__).parent
_TIMEOUT_S = 120


class Zygote:
    """The process that `zygote.py` describes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "zygote"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.docs.zygote", self.path],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.path.exists():
            assert self._process.poll() is None, "the zygote ended"
            assert time.monotonic() < deadline, "the zygote imports for too long"
            time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


class Page:
    """A reader in a clone's folder, with a terminal that is theirs alone.

    Args:
        folder: where the reader stands. It gets `examples/`, and `.venv/bin/kvrag`.
        environment: of the reader's terminal; KVRAG_ variables choose model and home.
        instead: texts of blocks, and what is run in their place.
    """

    def __init__(
        self,
        zygote: Zygote,
        folder: Path,
        environment: Mapping[str, str],
        instead: Mapping[str, str],
    ) -> None:
        self._zygote, self._folder, self._instead = zygote, folder, instead
        self._servers = folder / ".servers"
        self._session: socket.socket | None = None
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        program = programs / "kvrag"
        shim = [sys.executable, "-I", "-S", _HERE / "shim.py", zygote.path, self._servers]
        program.write_text(f'#!/bin/sh\nexec {" ".join(map(str, shim))} "$@"\n')
        program.chmod(0o755)
        # A few of its documents: what is tried is the command.
        few = shutil.ignore_patterns("0[3-9]-*", "1?-*")
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=few)
        self._environment = dict(environment) | {"PATH": f"{programs}:{environment['PATH']}"}

    def run(self, block: Block) -> str:
        """Run one block; what it printed. Raises AssertionError with the block's place."""
        text = block.text
        for old, new in self._instead.items():
            text = text.replace(old, new)
        return self._python(block, text) if block.language == "python" else self._bash(block, text)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        if self._servers.exists():
            for pid in map(int, self._servers.read_text().split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def _bash(self, block: Block, text: str) -> str:
        after = self._folder / ".environment"
        # What a block exports, the next ones have.
        script = f"set -e -o pipefail\n{text}\nenv -0 > {after}"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{block} ended with {done.returncode}\n{done.stderr}"
        pairs = [pair.partition("=") for pair in after.read_text().split("\0") if pair]
        self._environment = {name: value for name, _, value in pairs}
        return done.stdout

    def _python(self, block: Block, text: str) -> str:
        where = {"cwd": str(self._folder), "env": self._environment}
        if self._session is None:
            self._session = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._session.settimeout(_TIMEOUT_S)
            self._session.connect(str(self._zygote.path))
            request = json.dumps(where | {"argv": [], "session": True}).encode()
            socket.send_fds(self._session, [request], [0, 1, 2])
        self._session.send(json.dumps(where | {"code": text, "name": str(block)}).encode())
        answer = json.loads(self._session.recv(MESSAGE))
        assert answer["error"] is None, f"{block}\n{answer['error']}"
        return answer["out"]
