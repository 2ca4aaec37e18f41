"""Which dtype to calculate in for a dtype that is stored.

A CPU without bfloat16 instructions multiplies bfloat16 matrices some ten times slower than
float32 ones. There the stored numbers stay bfloat16 (weights are rounded to it, KV blocks are kept
in it, bit for bit) and the arithmetic is float32, which differs only in rounding less.
"""

from __future__ import annotations

import torch

__all__ = ["compute_dtype"]


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations and matrix products for tensors stored as `dtype` on `device`."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if dtype is torch.float16:
        native = capabilities.get("amx_fp16") or capabilities.get("avx512_fp16")
    else:
        native = (
            capabilities.get("avx512_bf16")
            or capabilities.get("amx_bf16")
            or capabilities.get("arm_bf16")
        )
    return dtype if native else torch.float32
