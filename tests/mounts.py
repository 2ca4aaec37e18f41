"""Small file systems, really mounted. Skips the test where that is not allowed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory at `folder`, with options such as `size=256k`."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = _mount("-t", "tmpfs", "-o", options, "tmpfs", folder)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        # At once from the tree, whoever still has files open.
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    done = _mount("-o", f"remount,{options}", folder)
    assert not done.returncode, done.stderr


def _mount(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["mount", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
