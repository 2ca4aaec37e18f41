from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvrag.cli.main import run
from tests.tiny import make_tiny_embedder, make_tiny_model

from .homes import TEXT

CHUNK_TOKENS = 64


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value that stdout holds, on one line."""
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def error(self) -> str:
        """The one line of stderr."""
        (line,) = self.err.splitlines()
        assert line.startswith("error: "), line
        return line


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model and a tiny embedder; do not write into them."""
    root = tmp_path_factory.mktemp("cli-models")
    return make_tiny_model(root / "model"), make_tiny_embedder(root / "embedder")


@pytest.fixture
def environment(isolated, tiny_folders, tmp_path) -> dict[str, str]:
    """Settings of the tiny model and a home of the test's own, in this process's environment."""
    model, embedder = tiny_folders
    settings = {
        "KVRAG_MODEL": str(model),
        "KVRAG_EMBEDDER": str(embedder),
        "KVRAG_HOME": str(tmp_path / "home"),
        "KVRAG_MODELS_DIR": str(tmp_path / "models"),
        "KVRAG_DTYPE": "float32",
        "KVRAG_THREADS": "1",
        "KVRAG_CHUNK_TOKENS": str(CHUNK_TOKENS),
        # One block a chunk, so that they can be counted.
        "KVRAG_FIRST_BLOCKS": "false",
    }
    os.environ.update(settings)  # `isolated` takes them out again
    return settings


@pytest.fixture
def kvrag(environment, capfd) -> Callable[..., Result]:
    """Run a command line in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The real command in a process of its own, with this process's environment."""
    command = [str(Path(sys.executable).with_name("kvrag")), *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A test run in the background ignores SIGINT, and its children would, too.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, text=True, preexec_fn=listen, **(pipes | options))


def execute(*arguments: object, **options: Any) -> Result:
    """Run the real command to its end."""
    with start(*arguments, **options) as process:
        out, err = process.communicate(timeout=240)
    return Result(process.returncode, out, err)


@pytest.fixture
def home(kvrag, environment, tmp_path) -> Path:
    """A home with a corpus of a few blocks."""
    (tmp_path / "karsk.txt").write_text(TEXT * 12)
    assert kvrag("precompute", tmp_path / "karsk.txt").code == 0
    return Path(environment["KVRAG_HOME"])
