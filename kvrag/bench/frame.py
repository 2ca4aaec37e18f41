"""What every benchmark prints: a line on the machine, a table for people, one JSON line last."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

__all__ = ["environment", "median", "print_environment", "print_json", "print_table", "show"]

_WIDTH_WITHOUT_TERMINAL = 160


def environment() -> dict[str, Any]:
    """Machine and versions that a figure belongs to."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "bf16_native": bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def median(values: Sequence[float]) -> float:
    """The median, rounded to what a shared machine can mean."""
    return float(f"{statistics.median(values):.4g}")


def show(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], result: Mapping[str, Any]
) -> None:
    """Print the machine, the table and, as the last line, `result` as JSON."""
    print_environment()
    print_table(title, columns, rows)
    print_json(result)


def print_environment() -> None:
    """One line on the machine and the versions."""
    _console().print(", ".join(f"{name} {value}" for name, value in environment().items()))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for people; no text in it is taken for markup."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(_cell, row))
    _console().print(table)


def _cell(value: object) -> str:
    """Numbers to four digits, and whole from ten thousand on."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def print_json(result: Mapping[str, Any]) -> None:
    """`result` with the environment on one line: a benchmark's last."""
    print(json.dumps({**result, "environment": environment()}), flush=True)


def _console() -> Console:
    console = Console(markup=False, highlight=False)
    if console.is_terminal:
        return console
    return Console(markup=False, highlight=False, width=_WIDTH_WITHOUT_TERMINAL)
