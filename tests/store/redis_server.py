"""A real redis-server for tests: on a port of its own, and gone with the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import redis

#: Valkey answers under the same protocol; which of them it is matters to few tests.
PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")


def free_port() -> int:
    """A port that nobody listens on, and below those that a cluster adds to it for its bus."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if port < 55000:
            return port


class RedisServer:
    """Starts at once, in `folder`, with further `options` of its command line."""

    def __init__(
        self, folder: Path, *options: str, sentinel: bool = False, program: str | None = None
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.socket = folder / "s"
        self._options, self._sentinel, self._program = options, sentinel, program or PROGRAM
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        plain = ["--save", "", "--appendonly", "no"]
        command = [
            *(self._program, *([str(self.folder / "conf")] if self._sentinel else [])),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
            *([] if self._sentinel else ["--unixsocket", str(self.socket), *plain]),
            *self._options,
            *(["--sentinel"] if self._sentinel else []),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait()

    def _wait(self) -> None:
        for _ in range(400):
            if self.process.poll() is not None:
                break
            with contextlib.suppress(redis.ConnectionError), self.client() as client:
                # Whatever it answers, it listens: it may want a password first.
                with contextlib.suppress(redis.AuthenticationError, redis.ResponseError):
                    client.ping()
                return
            time.sleep(0.025)
        raise RuntimeError(f"redis-server did not start: {(self.folder / 'log').read_text()}")

    def client(self, **options) -> redis.Redis:
        """A client that knows nothing of kvrag."""
        return redis.Redis(port=self.port, protocol=2, socket_timeout=10, **options)

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash does. What it held is lost."""
        self.process.kill()
        self.process.wait()

    close = kill

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
