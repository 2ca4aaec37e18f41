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

__all__ = ["environment", "median", "show"]

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
    """Print the table and, as the last line, `result` with the environment as JSON."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL)
    machine = environment()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)
    print(json.dumps({**result, "environment": machine}), flush=True)
