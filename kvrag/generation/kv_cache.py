"""The KV cache of one sequence: rotated K and V of every position, preallocated and growable."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrag.generation.kv_memory import KVMemory
from kvrag.models.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """K and V of positions 0 … `length` - 1 for all layers.

    `k[layer]` and `v[layer]` are (kv_heads, capacity, head_dim); index equals position. They are
    views of `kv`, (layers, 2, kv_heads, capacity, head_dim), which is one allocation in huge pages
    where there are any: those are written and read faster, but are taken whole, so that a roomy
    cache may take all of its memory when its first positions are written. What lies behind `length`
    is undefined, and may be what another request left there: a position that was not written is
    never read. Not thread-safe: a cache belongs to one running request.

    Args:
        memory: where the memory comes from and goes back to, on the CPU; None keeps none of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory: KVMemory | None = None,
    ) -> None:
        self._memory = KVMemory(0) if memory is None else memory
        shape = (config.num_layers, 2, config.num_kv_heads, max(1, capacity), config.head_dim)
        self._take(self._empty(shape, dtype, device))
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.kv.shape[3]

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes

    def reserve(self, length: int) -> None:
        """Make room for `length` positions; what is stored stays. Grows by at least a half.

        While it grows, both the smaller and the larger cache exist.
        """
        if length <= self.capacity:
            return
        old = self.kv
        shape = (*old.shape[:3], max(length, self.capacity * 3 // 2), old.shape[4])
        self._take(self._empty(shape, old.dtype, old.device))
        self.kv[..., : self.length, :] = old[..., : self.length, :]

    def write(self, layer: int, positions: Tensor | slice, k: Tensor, v: Tensor) -> None:
        """Store rotated K and V (kv_heads, n, head_dim) at `positions`; converts the dtype.

        Does not move `length`: a pass over the layers sets it once, at its end.
        """
        self.k[layer][:, positions] = k.to(self.k[layer].dtype)
        self.v[layer][:, positions] = v.to(self.v[layer].dtype)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length

    def _take(self, kv: Tensor) -> None:
        self.kv = kv
        self.k, self.v = list(kv[:, 0]), list(kv[:, 1])

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self._memory.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device)
