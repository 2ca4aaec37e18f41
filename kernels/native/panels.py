"""Weight matrices packed for native products with rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .operations import Native, threads_for

__all__ = ["Panels"]

_FUNCTIONS = {torch.bfloat16: "gemm_bf16", torch.float16: "gemm_f16"}


class Panels:
    """`x` (n, in) to `x @ weight.T + bias` (n, out), float32 on the CPU; thread-safe.

    The stored numbers are multiplied as they are. A row's result depends on no other row.

    Args:
        weight: (out, in), bfloat16 or float16; a packed copy is kept, 2 bytes a weight.
        bias: (out,), float32; None adds nothing.

    Raises:
        ValueError: a shape or dtype is another.
    """

    def __init__(self, native: Native, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.dtype not in _FUNCTIONS or weight.ndim != 2 or weight.device.type != "cpu":
            raise ValueError(
                "panels are made of (out, in) in bfloat16 or float16 on the CPU, not of "
                f"{weight.dtype} {tuple(weight.shape)} on {weight.device}"
            )
        self.outputs, self.inputs = weight.shape
        self.dtype = weight.dtype
        if bias is not None and (bias.shape != (self.outputs,) or bias.dtype != torch.float32):
            raise ValueError(
                f"bias must be float32 ({self.outputs},), got {bias.dtype} {tuple(bias.shape)}"
            )
        self._bias = None if bias is None else bias.contiguous()
        self._gemm = getattr(native.library, _FUNCTIONS[weight.dtype])
        width = ctypes.c_int64.in_dll(native.library, "gemm_panel").value
        self._panels = _packed(weight, width)

    @property
    def address(self) -> int:
        """Of the packed weights, which live as long as this."""
        return self._panels.data_ptr()

    @property
    def bias_address(self) -> int | None:
        return None if self._bias is None else self._bias.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """Raises ValueError: `x` is not float32 (n, in) on the CPU."""
        if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != self.inputs or not x.is_cpu:
            raise ValueError(
                f"x must be float32 (n, {self.inputs}) on the CPU, got {x.dtype} "
                f"{tuple(x.shape)} on {x.device}"
            )
        x = x if x.stride(1) == 1 else x.contiguous()
        n = x.shape[0]
        out = torch.empty(n, self.outputs)
        if out.numel():
            self._gemm(
                x.data_ptr(), n, x.stride(0), self._panels.data_ptr(), self.inputs, self.outputs,
                None if self._bias is None else self._bias.data_ptr(), out.data_ptr(),
                threads_for(self._panels.numel()),
            )  # fmt: skip
        return out


def _packed(weight: Tensor, width: int) -> Tensor:
    """(panels, in, width), the outputs behind the last being 0."""
    outputs, inputs = weight.shape
    panels = -(-outputs // width)
    packed = weight.new_zeros(panels, inputs, width)
    # bfloat16 outputs of the two halves alternate; see gemm.c.
    halves = (2, width // 2) if weight.dtype is torch.bfloat16 else (1, width)
    whole = outputs // width
    target = packed.view(panels, inputs, halves[1], halves[0]).permute(0, 3, 2, 1)
    target[:whole] = weight[: whole * width].view(whole, *halves, inputs)
    if whole < panels:
        rest = weight.new_zeros(width, inputs)
        rest[: outputs - whole * width] = weight[whole * width :]
        target[whole] = rest.view(*halves, inputs)
    return packed
