"""Rotary position embeddings (RoFormer, arXiv 2104.09864; llama3 scaling as Llama 3.1 has it).

Angles are computed in float32, as the models were trained, whatever the compute dtype is. K is
stored un-rotated and rotated here when its place in the prompt is known, which is exact for every
variant that depends on the position alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvrag.models.config import RopeConfig

__all__ = ["Rope", "inverse_frequencies"]


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians a position for each pair of dimensions: float32 (head_dim / 2,)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (config.theta**exponents)
    if config.kind == "default":
        return inv_freq
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between blended.
    wavelength = 2 * math.pi / inv_freq
    low, high = config.low_freq_factor, config.high_freq_factor
    smooth = (config.original_max_positions / wavelength - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / config.factor + smooth * inv_freq


class Rope:
    """Cosines and sines of positions 0 … `max_positions` - 1, made once for a model."""

    def __init__(
        self,
        config: RopeConfig,
        head_dim: int,
        max_positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        angles = torch.outer(
            torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(config, head_dim)
        )
        # Both halves of a head turn by the same angles: (max_positions, head_dim).
        self._cos = angles.cos().to(dtype).repeat(1, 2).to(device)
        sin = angles.sin().to(dtype).to(device)
        # The sign of `rotate_half` is put into the table, so that rotating is two multiplications.
        self._sin = torch.cat((-sin, sin), dim=-1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn `x` (heads, n, head_dim) to `positions` int64 (n,); returns a new tensor."""
        half = x.shape[-1] // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        return torch.addcmul(x * self._cos[positions], swapped, self._sin[positions])
