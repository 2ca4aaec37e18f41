"""Other engines beside kvrag's strategies, each in a process of its own interpreter.

    with Peer.start(peer_option("vllm=/venvs/vllm/bin/python"), load, timeout_s=600) as peer:
        timing = peer.time(token_ids, new_tokens=16)

What a peer runs is a file of `peer_workers/`, where the protocol is described. A peer waits for its
next prompt blocked on a pipe. One that does not answer in time is killed, with all that it started.
Nothing here knows strategies, prompts or tables.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from kvrag.bench.gguf_export import export_gguf
from kvrag.errors import InputError, KvragError

__all__ = ["PEERS", "Load", "Peer", "PeerError", "PeerOption", "Timing", "peer_option"]

_WORKERS = Path(__file__).with_name("peer_workers")
_DTYPES = ("float32", "bfloat16", "float16")
#: Most characters of a reason: it stands in a table.
_REASON_CHARS = 300

#: The adapter of each peer.
PEERS: Mapping[str, Path] = {
    "vllm": _WORKERS / "vllm_adapter.py",
    "kvboost": _WORKERS / "kvboost_adapter.py",
    "llama.cpp": _WORKERS / "llama_cpp_adapter.py",
}


class PeerError(KvragError):
    """A peer could not start, failed or did not answer in time; the message says which."""


@dataclass(frozen=True, slots=True)
class PeerOption:
    """A peer as it was asked for. label: its name in tables. dtype: None for everybody's."""

    label: str
    kind: str
    dtype: str | None
    python: str


@dataclass(frozen=True, slots=True)
class Load:
    """What a peer loads.

    model: a folder of the Hugging Face format. max_tokens: of the longest prompt and its answer.
    """

    model: str
    dtype: str
    threads: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """ttft_s: from the call to the first token. token_s: a further token. ids: the tokens."""

    ttft_s: float
    token_s: float
    ids: tuple[int, ...]


def peer_option(text: str) -> PeerOption:
    """`NAME=PYTHON` or `NAME:DTYPE=PYTHON`.

    Raises:
        InputError: the text has another form, or no such peer or dtype is known.
    """
    label, equals, python = text.partition("=")
    kind, colon, dtype = label.partition(":")
    if not equals or not python or kind not in PEERS or (colon and dtype not in _DTYPES):
        raise InputError(
            f"peer {text!r} is not of the form NAME=PYTHON or NAME:DTYPE=PYTHON; names are "
            f"{', '.join(PEERS)}, dtypes {', '.join(_DTYPES)}, and PYTHON is the interpreter of "
            "the environment that the peer is installed in"
        )
    return PeerOption(label, kind, dtype or None, python)


class Peer:
    """A running peer: `time` prompts, then `close`. timeout_s: for each answer; may be changed."""

    def __init__(self, command: Sequence[str], load: Load, *, timeout_s: float) -> None:
        """Start `command`, a worker, and wait until it has loaded. See `start`.

        Raises:
            PeerError: it cannot start or load, or not within `timeout_s`.
        """
        self.timeout_s = timeout_s
        with ExitStack() as stack:
            # Not a pipe: nobody would read it, and a full one stops the peer.
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            self._process = _spawn(command, self._stderr)
            stack.callback(self._end)
            facts = self._ask(asdict(load)).get("ready", {})
            self.version = str(facts.get("version"))
            self.caches_prefixes = facts.get("prefix_cache") is True
            self._stack = stack.pop_all()

    @classmethod
    def start(cls, option: PeerOption, load: Load, *, scratch: Path, timeout_s: float) -> Self:
        """Start the peer in its interpreter; files that only it reads are made in `scratch`.

        Raises:
            PeerError: see `__init__`.
        """
        if option.kind == "llama.cpp":
            file = scratch / f"model-{load.dtype}.gguf"
            if not file.exists():
                export_gguf(Path(load.model), file, load.dtype)
            load = Load(str(file), load.dtype, load.threads, load.max_tokens)
        command = [option.python, str(_WORKERS / "worker.py"), str(PEERS[option.kind])]
        return cls(command, load, timeout_s=timeout_s)

    def time(self, ids: Sequence[int], new_tokens: int) -> Timing:
        """Answer a prompt greedily with `new_tokens` tokens, ends of text ignored.

        Raises:
            PeerError: it failed or did not answer in time, and has ended.
        """
        answer = self._ask({"ids": list(ids), "new_tokens": new_tokens})
        try:
            return Timing(
                float(answer["ttft_s"]), float(answer["token_s"]), tuple(map(int, answer["ids"]))
            )
        except (KeyError, TypeError, ValueError) as exc:
            self.close()
            raise PeerError(f"it answered {_short(str(answer))}") from exc

    def close(self) -> None:
        """End the process and what it started. A second call does nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line and read one; a killed process ends both."""
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
            raise PeerError(_short(str(answer["error"])))
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


def _short(text: str) -> str:
    """One line that fits into a table."""
    line = " ".join(text.split())
    return line if len(line) <= _REASON_CHARS else f"{line[:_REASON_CHARS]} …"
