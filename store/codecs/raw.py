"""`raw`: the compute dtype bit for bit, K then V, each in C order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .base import Layout
from .memory import check_length, check_pair, dtype_of, joined, tensor_over

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

    def encode(self, k: torch.Tensor, v: torch.Tensor, *, layer: int) -> Buffer:
        """k, v: (kv_heads, tokens, head_dim) → K bytes, V bytes. Raises `UnencodableError`."""
        check_pair(self.name, k, v, _DTYPES)
        return joined((k, v))

    def decode(self, buffer: Buffer, header: BlockHeader) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V over the memory of `buffer`, which lives as long as they do.

        Read-only by contract: writing into them would write into the store's copy. Raises
        `BlockFormatError` for a dtype that raw does not keep, or a buffer too short.
        """
        dtype = dtype_of(self.name, header.dtype, _DTYPES)
        k_shape, v_shape = header.k_shape[1:], header.v_shape[1:]
        k_nbytes = math.prod(k_shape) * dtype.itemsize
        end = k_nbytes + math.prod(v_shape) * dtype.itemsize
        whole = tensor_over(buffer)
        check_length(len(whole), end)
        k = whole[:k_nbytes].view(dtype).view(k_shape)
        v = whole[k_nbytes:end].view(dtype).view(v_shape)
        return k, v

    def layout(self, header: BlockHeader) -> Layout | None:
        """See `Codec.layout`."""
        dtype = _DTYPES.get(header.dtype)
        if dtype is None or header.k_shape != header.v_shape:
            return None
        return Layout(dtype, header.k_shape[1:])
