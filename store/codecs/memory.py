"""Tensors over bytes and bytes of tensors, and which K and V a codec takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import BlockFormatError, UnencodableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

__all__ = ["check_length", "check_pair", "dtype_of", "joined", "tensor_over"]


def check_pair(
    codec: str, k: torch.Tensor, v: torch.Tensor, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Raises `UnencodableError` for K and V that are no pair of one layer in one of the dtypes."""
    if k.dtype != v.dtype or k.dtype not in dtypes.values():
        raise UnencodableError(
            f"{codec} takes K and V of one dtype of {', '.join(dtypes)}, "
            f"got {k.dtype} and {v.dtype}"
        )
    sound = k.ndim == v.ndim == 3 and k.shape[:2] == v.shape[:2]
    if not sound or 0 in (k.shape[2], v.shape[2]):
        raise UnencodableError(
            f"{codec} takes K and V of (kv_heads, tokens, head_dim), "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )


def dtype_of(codec: str, name: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of a header. Raises `BlockFormatError` for one that the codec does not keep."""
    if name not in dtypes:
        raise BlockFormatError(f"{codec} keeps {', '.join(dtypes)}, not {name}")
    return dtypes[name]


def joined(tensors: Sequence[torch.Tensor]) -> Buffer:
    """The bytes of the tensors in C order, one after another, in memory of their own."""
    parts = [_bytes_of(tensor) for tensor in tensors]
    whole = np.empty(sum(part.size for part in parts), dtype=np.uint8)
    np.concatenate(parts, out=whole)
    return whole.data


def tensor_over(buffer: Buffer) -> torch.Tensor:
    """The bytes of a buffer, uint8 (n,), not copied; the buffer lives as long.

    Read-only by contract: torch has no read-only tensors.
    """
    return torch.from_numpy(_borrowed(buffer))


def check_length(nbytes: int, needed: int) -> None:
    """Raises `BlockFormatError` for a layer that is too short."""
    if nbytes < needed:
        raise BlockFormatError(f"a layer of this block takes {needed} bytes, got {nbytes}")


def _bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    flat = tensor.detach().cpu().contiguous().view(-1)
    array: np.ndarray[Any, np.dtype[np.uint8]] = flat.view(torch.uint8).numpy()
    return array


@dataclass(frozen=True, slots=True)
class _Borrowed:
    """Shows memory to numpy as writable, because torch has no read-only tensors and warns.

    `owner` is kept alive by the array made from this.
    """

    owner: Any
    __array_interface__: dict[str, Any]


def _borrowed(buffer: Buffer) -> np.ndarray[Any, np.dtype[np.uint8]]:
    owner = np.frombuffer(memoryview(buffer).cast("B"), dtype=np.uint8)
    interface = {
        "version": 3,
        "shape": owner.shape,
        "typestr": "|u1",
        "data": (owner.ctypes.data, False),
    }
    return np.asarray(_Borrowed(owner, interface))
