"""What the header of a safetensors file says, and what is wrong with a file that is none.

The library checks the same and more when it maps the file, but names neither the tensor that a
download lost nor a Git LFS pointer.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrag.errors import ModelError, ModelNotFoundError
from kvrag.models.folder import is_lfs_pointer

__all__ = ["StoredTensor", "read_header"]

#: The format's own bound on the bytes of a header.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file. `dtype` is the format's name of it: F32, BF16, I8 …"""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file.

    Raises:
        ModelNotFoundError: no such file.
        ModelError: it cannot be read, is no safetensors file, or was cut short.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(64)
            if is_lfs_pointer(begin):
                raise ModelError(
                    f"weights file {path} is a Git LFS pointer, not the weights: run `git lfs "
                    f"pull` in {path.parent}, or download the file itself"
                )
            length = int.from_bytes(begin[:8], "little")
            file.seek(8)
            content = file.read(length) if length <= min(size, _MAX_HEADER) else b""
    except FileNotFoundError as exc:
        raise ModelNotFoundError(f"weights file {path} is not there any more") from exc
    except OSError as exc:
        raise ModelError(f"weights file {path} cannot be read: {exc.strerror or exc}") from exc
    if size < 8:
        raise _damaged(path, f"it has {size} bytes" if size else "it is empty")
    if length > _MAX_HEADER:
        raise _damaged(path, "it does not begin with a safetensors header")
    if size < 8 + length:
        raise _damaged(
            path, f"it has {size} bytes, but its header alone needs {8 + length}; it was cut short"
        )
    tensors = _tensors(path, content)
    _check_length(path, size - 8 - length, tensors)
    return [tensor for _, tensor in tensors]


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"weights file {path} is damaged: {why}")


def _tensors(path: Path, content: bytes) -> list[tuple[int, StoredTensor]]:
    """Where each tensor ends behind the header, and the tensor."""
    try:
        header: dict[str, Any] = json.loads(content)
        tensors = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            numbers = (*shape, begin, end - begin)
            if any(type(number) is not int or number < 0 for number in numbers):
                raise _damaged(path, f"the tensor {name!r} has an impossible shape or place")
            tensors.append((end, StoredTensor(path, name, str(entry["dtype"]), shape, end - begin)))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as exc:
        raise _damaged(path, f"its header cannot be read ({exc})") from exc
    return tensors


def _check_length(path: Path, nbytes: int, tensors: list[tuple[int, StoredTensor]]) -> None:
    """Raises when the file ends before its tensors do."""
    lost = [(end, tensor.name) for end, tensor in tensors if end > nbytes]
    if lost:
        _, first = min(lost)
        short = max(lost)[0] - nbytes
        size = path.stat().st_size
        raise _damaged(
            path,
            f"it has {size} bytes and should have {size + short}; it was cut short, and {first!r} "
            "is the first tensor that is not whole",
        )
