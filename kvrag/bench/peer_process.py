"""A process of another interpreter that answers lines of JSON with lines of JSON.

It waits for its next line blocked on a pipe. One that does not answer in time is killed, with all
that it started. Nothing here knows what is asked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import IO, Any, Self

from kvrag.errors import KvragError

__all__ = ["PeerError", "PeerProcess", "short"]

#: Most characters of a reason: it stands in a table.
_REASON_CHARS = 300


class PeerError(KvragError):
    """A peer could not start, failed or did not answer in time; the message says which."""


class PeerProcess:
    """A running worker: `ask` it, then `close`. timeout_s: for each answer; may be changed."""

    def __init__(
        self, command: Sequence[str], load: Mapping[str, Any], *, timeout_s: float
    ) -> None:
        """Start `command`, a worker, and wait until it has loaded what the first line says.

        Raises:
            PeerError: it cannot start or load, or not within `timeout_s`.
        """
        self.timeout_s = timeout_s
        with ExitStack() as stack:
            # Not a pipe: nobody would read it, and a full one stops the peer.
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            self._process = _spawn(command, self._stderr)
            stack.callback(self._end)
            #: What it says of itself.
            self.facts: Mapping[str, Any] = self.ask(load).get("ready", {})
            self._stack = stack.pop_all()

    @property
    def version(self) -> str:
        return str(self.facts.get("version"))

    def close(self) -> None:
        """End the process and what it started. A second call does nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line and read one; a killed process ends both.

        Raises:
            PeerError: it failed or did not answer in time.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._kill()

        timer = threading.Timer(self.timeout_s, expire)
        timer.start()
        try:
            answer = self._exchange(json.dumps(message))
        finally:
            timer.cancel()
        if expired.is_set():
            raise PeerError(f"no answer within {self.timeout_s:g} s")
        if "error" in answer:
            raise PeerError(short(str(answer["error"])))
        return answer

    def _exchange(self, line: str) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or stdin.closed:
            raise PeerError("it was closed")
        with suppress(BrokenPipeError):  # it has ended; it may have said why
            stdin.write(f"{line}\n")
            stdin.flush()
        answer = stdout.readline()
        try:
            parsed = json.loads(answer)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            return {"error": f"it answered {answer!r}" if answer else self._last_words()}
        return parsed

    def _last_words(self) -> str:
        """Why the process ended, from its exit code and the last line that it wrote."""
        self._kill()
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return f"its process ended with exit code {code}: {last}"

    def _kill(self) -> None:
        # Until it has been waited for, its number is nobody else's.
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _end(self) -> None:
        self._kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # what was written last never arrived
                if stream is not None:
                    stream.close()


def _spawn(command: Sequence[str], stderr: IO[bytes]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # A process group of its own, so that its children can be killed with it.
            start_new_session=True,
        )
    except OSError as exc:
        raise PeerError(f"{command[0]} cannot be started: {exc.strerror or exc}") from exc


def short(text: str) -> str:
    """One line that fits into a table."""
    line = " ".join(text.split())
    return line if len(line) <= _REASON_CHARS else f"{line[:_REASON_CHARS]} …"
