"""Products of rows with a weight matrix, in the dtype to calculate in.

A CPU without bfloat16 arithmetic calculates in float32, but reading float32 weights for every
decoded token is twice the memory traffic that bfloat16 weights need, and decoding is bound by it.
There native code packs the weights as they are, and widens them as it multiplies: half the memory,
and prefill as fast. Without native code they are packed as float16 for FBGEMM. float16 holds every
bfloat16 number between 2**-14 and 65,504 exactly; smaller ones are rounded by at most 2**-25.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import Int8Weights, Native, Panels

__all__ = ["Linear", "OneRow", "linear", "row_major"]

_LARGEST_FLOAT16 = 65504.0
#: Outputs of one packed part: a weight of 65,536 x 640 is packed three times faster than whole.
_PART_OUTPUTS = 8192


class Linear(Protocol):
    """`x` (n, in) to (n, out), both of the compute dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...


def linear(
    weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype, native: Native | None = None
) -> Linear:
    """The fastest product with `weight` (out, in) that keeps its precision.

    `weight` has the stored dtype; float32 and float64 weights are never rounded. `native`: for
    float32 on the CPU.
    """
    wide = None if bias is None else bias.to(compute_dtype)
    if native is not None and weight.dtype in (torch.bfloat16, torch.float16):
        return Panels(native, weight, wide)
    if _packs(weight, compute_dtype):
        return _Packed(weight, wide)
    return _Dense(weight.to(compute_dtype), wide)


def row_major(weight: Tensor, compute_dtype: torch.dtype, native: Native | None) -> Linear:
    """`linear` without a bias for a weight that is mostly multiplied by one row, as heads are.

    With native code one row reads the weight as it is stored; the packed copy of it is made when
    several rows are first multiplied.
    """
    if native is None or weight.dtype not in (torch.bfloat16, torch.float16):
        return linear(weight, None, compute_dtype)
    return OneRow(native, weight, _WhenNeeded(native, weight))


class OneRow:
    """One row times a weight (out, in) that native code reads; several rows go through `several`.

    Args:
        weight: what `Native.gemv` takes.
    """

    def __init__(self, native: Native, weight: Tensor | Int8Weights, several: Linear) -> None:
        self._native, self._weight, self._several = native, weight, several

    def __call__(self, x: Tensor) -> Tensor:
        return self._native.gemv(self._weight, x) if x.shape[0] == 1 else self._several(x)


class _WhenNeeded:
    """`Panels`, made by the first call."""

    def __init__(self, native: Native, weight: Tensor) -> None:
        self._native, self._weight = native, weight

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)

    @cached_property
    def _product(self) -> Linear:
        return Panels(self._native, self._weight)


class _Dense:
    """torch's own product; shares the memory of `weight`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class _Packed:
    """FBGEMM's product of float32 rows with float16 weights.

    Large weights are packed in parts: FBGEMM packs them several times faster, and no float32 copy
    of the whole is made.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        parts = torch.split(weight, _PART_OUTPUTS)
        biases = [None] * len(parts) if bias is None else torch.split(bias, _PART_OUTPUTS)
        self._parts: list[Any] = [
            torch.ops.quantized.linear_prepack_fp16(part.float(), part_bias)
            for part, part_bias in zip(parts, biases, strict=True)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        products: list[Tensor] = [
            torch.ops.quantized.linear_dynamic_fp16(x, part) for part in self._parts
        ]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _packs(weight: Tensor, compute_dtype: torch.dtype) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.bfloat16, torch.float16)
        and compute_dtype is torch.float32
        and "fbgemm" in torch.backends.quantized.supported_engines
        and bool(weight.abs().max() <= _LARGEST_FLOAT16)
    )
