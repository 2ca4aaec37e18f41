"""One layer of codes of stored K and V to numbers, by native code.

On the calling thread alone: what is loaded is decoded by several threads of the loader already.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .operations import Native

__all__ = ["NativeUnpack"]

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class NativeUnpack:
    """`Unpack` of the store's codecs; how codes lie in a layer is said in docs/codecs.md."""

    def __init__(self, native: Native) -> None:
        self._functions = {}
        for dtype, suffix in _SUFFIXES.items():
            function = getattr(native.library, f"unpack_{suffix}")
            function.restype = ctypes.c_int64
            self._functions[dtype] = function

    def __call__(
        self, layer: Tensor, k: Tensor, v: Tensor, *, bits: int, groups: int, parts: int
    ) -> int:
        """Fill `k` and `v`, and return how many bytes a layer of these codes takes.

        If that is more than there are, `k` and `v` are left as they were.

        Args:
            layer: uint8 (n,), contiguous, on the CPU.
            k: bfloat16 or float32 (kv_heads, tokens, head_dim), contiguous.
            v: the same dtype, (kv_heads, tokens, head_dim_v).
            bits: 4 or 8. groups: of tokens, that share K's scales. parts: of a row of V.

        Raises:
            ValueError: a dtype, shape or number is another.
        """
        _check("layer", layer, 1, torch.uint8)
        _check("k", k, 3, *_SUFFIXES)
        _check("v", v, 3, k.dtype)
        heads, tokens, k_dim = k.shape
        v_dim = v.shape[2]
        if v.shape[:2] != k.shape[:2] or bits not in (4, 8):
            raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} of {bits} bits")
        if parts < 1 or v_dim % parts or not 0 <= groups <= tokens or (groups == 0 < tokens):
            raise ValueError(
                f"{groups} groups of {tokens} tokens, {parts} parts of {v_dim} numbers"
            )
        if not (k_dim and v_dim):
            raise ValueError(f"heads of {k_dim} and {v_dim} numbers; they need one at least")
        needed: int = self._functions[k.dtype](
            layer.data_ptr(), layer.shape[0], heads, tokens, k_dim, v_dim, bits, groups, parts,
            k.data_ptr(), v.data_ptr(),
        )  # fmt: skip
        return needed


def _check(name: str, tensor: Tensor, ndim: int, *dtypes: torch.dtype) -> None:
    fits = tensor.dtype in dtypes and tensor.ndim == ndim and tensor.is_contiguous()
    if not fits or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be contiguous {' or '.join(map(str, dtypes))} of {ndim} dimensions on "
            f"the CPU, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
