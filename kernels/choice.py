"""Which implementation runs: chosen once, when a model is opened, never at import.

`auto` takes the fastest that can run and says in the log why it took no faster one. A choice by
name must be kept or refused.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from . import reference
from .contract import Kernels
from .cpu import cpu_kernels
from .errors import KernelsUnavailableError
from .native import load

__all__ = ["NAMES", "choose"]

NAMES = ("auto", "torch", "cpu", "triton")

_logger = logging.getLogger(__name__)


def choose(
    name: str, device: torch.device, dtype: torch.dtype, *, native_folder: Path | None = None
) -> Kernels:
    """The kernels to calculate with in `dtype` on `device`.

    Args:
        name: "torch" is the slow reference, "cpu" works by blocks that fit into a CPU's caches,
            on any device, "triton" is for GPUs. "auto" takes Triton on a GPU where it can run,
            and "cpu" otherwise.
        native_folder: where "cpu" keeps the native code that it compiles for float32 on a CPU;
            None does without. It also does without, and logs why, where that is not possible.

    Raises:
        KernelsUnavailableError: the name is unknown, or its kernels cannot run here.
    """
    if name not in NAMES:
        raise KernelsUnavailableError(f"unknown kernels {name!r}; known are {', '.join(NAMES)}")
    if name == "torch":
        return reference.KERNELS
    if name == "triton":
        return _triton(device, dtype)
    if name == "auto" and device.type == "cuda":
        try:
            return _triton(device, dtype)
        except KernelsUnavailableError as exc:
            _logger.warning("plain torch runs on %s, which is slow: %s", device, exc)
    native = None
    if native_folder is not None and device.type == "cpu" and dtype is torch.float32:
        native = load(native_folder)
    return cpu_kernels(native)


def _triton(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Raises KernelsUnavailableError: why they cannot run."""
    try:
        import triton
    except ImportError as exc:
        raise KernelsUnavailableError(
            "Triton's kernels need the package triton: pip install 'kvrag[triton]'"
        ) from exc
    # Triton's interpreter, which tests switch on, runs on the CPU.
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise KernelsUnavailableError(f"Triton's kernels run on GPUs, and the model is on {device}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise KernelsUnavailableError(
            "Triton's kernels calculate in float32, float16 or bfloat16, and the compute dtype is "
            f"{dtype}"
        )
    from .triton import KERNELS

    return KERNELS
