"""`raw`: the compute dtype bit for bit, K then V, each in C order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import BlockFormatError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..header import BlockHeader

__all__ = ["RawCodec"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class RawCodec:
    """Keeps float32, bfloat16, float16 and float64 as they are; decoding copies nothing."""

    name = "raw"
    version = 1
    params_digest = ""

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> Buffer:
        """k, v: (kv_heads, tokens, head_dim) → K bytes, V bytes. Raises `ValueError`."""
        if k.dtype != v.dtype or k.dtype not in _DTYPES.values():
            raise ValueError(
                f"raw takes K and V of one dtype of {', '.join(_DTYPES)}, "
                f"got {k.dtype} and {v.dtype}"
            )
        if k.ndim != 3 or v.ndim != 3 or k.shape[:2] != v.shape[:2]:
            raise ValueError(
                "raw takes K and V of (kv_heads, tokens, head_dim), "
                f"got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        parts = [_bytes_of(tensor) for tensor in (k, v)]
        whole = np.empty(sum(part.size for part in parts), dtype=np.uint8)
        np.concatenate(parts, out=whole)
        return whole.data

    def decode(self, buffer: Buffer, header: BlockHeader) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V over the memory of `buffer`, which lives as long as they do.

        Read-only by contract: writing into them would write into the store's copy. Raises
        `BlockFormatError` for a dtype that raw does not keep, or a buffer too short.
        """
        dtype = _DTYPES.get(header.dtype)
        if dtype is None:
            raise BlockFormatError(f"raw keeps {', '.join(_DTYPES)}, not {header.dtype}")
        k_shape, v_shape = header.k_shape[1:], header.v_shape[1:]
        k_nbytes = math.prod(k_shape) * dtype.itemsize
        end = k_nbytes + math.prod(v_shape) * dtype.itemsize
        view = memoryview(buffer).cast("B")
        if len(view) < end:
            raise BlockFormatError(f"a layer of this block takes {end} bytes, got {len(view)}")
        whole = torch.from_numpy(_borrowed(view[:end]))
        k = whole[:k_nbytes].view(dtype).view(k_shape)
        v = whole[k_nbytes:].view(dtype).view(v_shape)
        return k, v


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


def _borrowed(view: memoryview) -> np.ndarray[Any, np.dtype[np.uint8]]:
    owner = np.frombuffer(view, dtype=np.uint8)
    interface = {
        "version": 3,
        "shape": owner.shape,
        "typestr": "|u1",
        "data": (owner.ctypes.data, False),
    }
    return np.asarray(_Borrowed(owner, interface))
