"""Loading the compiled kernels, and trusting them only after they agreed with torch."""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch

from ..errors import KernelsUnavailableError
from .build import library_path
from .check import check
from .operations import Native

__all__ = ["load"]

_logger = logging.getLogger(__name__)

_ROTATE = (c_void_p, *[c_int64] * 5, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p,
           c_int64, c_int64, c_int, c_int)  # fmt: skip
_GEMV = (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int)
_GEMM = (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int)
_GATED = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int)
_UNPACK = (c_void_p, *[c_int64] * 8, c_void_p, c_void_p)
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "rotate_into_f32": _ROTATE,
    "rotate_into_bf16": _ROTATE,
    "rotate_into_f16": _ROTATE,
    "bounds": (c_void_p, c_int64, c_void_p),
    "put_chunks": (c_void_p, *[c_int64] * 3, c_void_p, c_void_p, c_int64,
                   *[c_void_p, c_int64, c_int64] * 2, c_int),
    "put_stored": (c_void_p, c_void_p, *[c_int64] * 3, c_void_p, c_void_p, c_int64,
                   *[c_void_p, c_int64, c_int64] * 2, c_void_p, c_int),
    "rms_norm": (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_float, c_void_p, c_int64, c_int),
    "gated_silu": _GATED,
    "gated_gelu_tanh": _GATED,
    "attend": (*[c_void_p] * 4, *[c_int64] * 4, c_void_p, c_void_p, c_float, c_int64, c_int64,
               c_void_p, c_void_p, c_void_p, c_int),
    "decode": (c_void_p, *[c_int64] * 4, *[c_void_p] * 6, c_float, c_void_p, c_void_p, c_int),
    "gemv_f32": _GEMV,
    "gemv_bf16": _GEMV,
    "gemv_f16": _GEMV,
    "gemv_i8": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int),
    "gemm_bf16": _GEMM,
    "gemm_f16": _GEMM,
    "unpack_f32": _UNPACK,
    "unpack_bf16": _UNPACK,
    "project_rows": (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int),
    "finish_rows": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int),
    "advance_rows": (c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64,
                     *[c_void_p, c_int64, c_int64] * 2, c_int64, c_void_p, c_void_p, c_int),
    "layers": (*[c_void_p] * 5, c_int64, c_int64, c_void_p, c_int),
}  # fmt: skip


@functools.cache
def load(folder: Path, *, compiler: str = "cc") -> Native | None:
    """The native kernels, or None, with the reason in the log once, where they cannot be had.

    The first time on a machine takes some seconds of compiling.

    Args:
        folder: where the compiled library is kept: the user's own, never shared.
        compiler: the C compiler, GCC or Clang.
    """
    try:
        return _loaded(folder, compiler)
    except KernelsUnavailableError as exc:
        _logger.warning("torch calculates what native kernels would do faster: %s", exc)
        return None


def _loaded(folder: Path, compiler: str) -> Native:
    path = library_path(folder, compiler=compiler, openmp=_openmp())
    try:
        library = ctypes.CDLL(str(path))
        for name, types in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
        library.attend_scratch.argtypes = [*[c_int64] * 5, c_int]
        library.advance_scratch.argtypes = [c_void_p, c_int64, c_int64, c_int]
        for name in ("attend_scratch", "advance_scratch", "advance_rows"):
            getattr(library, name).restype = c_int64
        library.xxh3_64.argtypes = [c_void_p, c_int64]
        library.xxh3_64.restype = c_uint64
        native = Native(library)
    except (OSError, AttributeError, ValueError) as exc:
        raise KernelsUnavailableError(f"{path} cannot be loaded: {exc}") from exc
    check(native)
    return native


def _openmp() -> Path | None:
    """The OpenMP runtime that torch has loaded, so that both use one pool of threads."""
    torch_folder = Path(torch.__file__).parent
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    mapped = {Path(line[line.index("/") :]) for line in lines if "/" in line}
    runtimes = [p for p in sorted(mapped) if p.name.startswith(("libgomp", "libiomp", "libomp"))]
    # torch's own folder first: another package may have brought a runtime of its own.
    runtimes.sort(key=lambda path: torch_folder not in path.parents)
    return runtimes[0] if runtimes else None
