"""Processes that this one started, as Linux lists them."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["alive", "descendants"]


def descendants() -> dict[int, str]:
    """Id and command line of each, children of children included; not of those that ended."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                # Behind the name, which may hold anything: state, parent, …
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
            if state != "Z":
                parents[int(folder.name)] = int(parent)
                commands[int(folder.name)] = command
    found, ours = {}, {os.getpid()}
    while new := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= new
        found.update((child, commands[child]) for child in new)
    return found


def alive(process: int) -> bool:
    """Whether a process that this one may signal is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
