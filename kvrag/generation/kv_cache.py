"""The KV cache of one sequence: rotated K and V of every position, preallocated and growable."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrag.models.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """K and V of positions 0 … `length` - 1 for all layers.

    `k[layer]` and `v[layer]` are (kv_heads, capacity, head_dim); index equals position. What lies
    behind `length` is undefined. Not thread-safe: a cache belongs to one running request.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_kv_heads, max(1, capacity), config.head_dim)
        self.k = [torch.empty(shape, dtype=dtype, device=device) for _ in config.layers]
        self.v = [torch.empty(shape, dtype=dtype, device=device) for _ in config.layers]
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.k[0].shape[1]

    @property
    def nbytes(self) -> int:
        return 2 * len(self.k) * self.k[0].numel() * self.k[0].element_size()

    def reserve(self, length: int) -> None:
        """Make room for `length` positions; what is stored stays. Grows by at least a half."""
        if length <= self.capacity:
            return
        capacity = max(length, self.capacity * 3 // 2)
        # Layer by layer, so that at most one layer exists twice.
        for tensors in (self.k, self.v):
            for layer, old in enumerate(tensors):
                new = old.new_empty(old.shape[0], capacity, old.shape[2])
                new[:, : self.length] = old[:, : self.length]
                tensors[layer] = new

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
