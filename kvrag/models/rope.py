"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and their long-context variants.

linear: position interpolation (arXiv 2306.15595). llama3: as Llama 3.1 has it. yarn: arXiv
2309.00071. longrope: arXiv 2402.13753.

Angles are computed in float32, as the models were trained, whatever the compute dtype is. K is
stored un-rotated and rotated here when its place in the prompt is known, which is exact for every
variant that depends on the position alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvrag.models.rope_config import RopeConfig

__all__ = ["Rope", "inverse_frequencies"]

#: Positions in a table at first. Models of a million positions are seldom asked for all.
_FIRST_POSITIONS = 8192


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """Radians a position for each pair of dimensions: float32 (rotary_dim / 2,)."""
    dim = config.rotary_dim
    powers = config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.kind == "longrope":
        return 1.0 / (torch.tensor(config.stretch, dtype=torch.float32) * powers)
    plain = 1.0 / powers
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "yarn":
        return _yarn(config, plain, 1.0 / (config.factor * powers))
    return plain


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / plain
    low, high = config.low_freq_factor, config.high_freq_factor
    smooth = (config.original_max_positions / wavelength - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * plain / config.factor + smooth * plain


def _yarn(config: RopeConfig, plain: Tensor, stretched: Tensor) -> Tensor:
    """Frequencies that turn often within the original context are kept, rare ones stretched."""
    dim = config.rotary_dim

    def pair_that_turns(times: float) -> float:
        turns = config.original_max_positions / (times * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return stretched * (1 - kept) + plain * kept


class Rope:
    """Cosines and sines of positions, computed once for a model as far as they are asked for.

    Thread-safe: a longer table takes the place of the shorter one, with the same numbers in it.
    """

    def __init__(
        self,
        config: RopeConfig,
        max_positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config, self._max_positions = config, max_positions
        self._dtype, self._device = dtype, device
        self._tables = self._computed(min(_FIRST_POSITIONS, max_positions))

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn `x` (heads, n, head_dim) to `positions`, int64 (n,), ascending; a new tensor."""
        dim = self._config.rotary_dim
        if x.shape[-1] > dim:
            return torch.cat((self._turned(x[..., :dim], positions), x[..., dim:]), dim=-1)
        return self._turned(x, positions)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self._upto(int(positions[-1]) + 1 if len(positions) else 0)
        half = x.shape[-1] // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        return torch.addcmul(x * cos[positions], swapped, sin[positions])

    def _upto(self, length: int) -> tuple[Tensor, Tensor]:
        tables = self._tables
        if length > len(tables[0]):
            tables = self._computed(min(max(length, 2 * len(tables[0])), self._max_positions))
            self._tables = tables
        return tables

    def _computed(self, length: int) -> tuple[Tensor, Tensor]:
        """(length, rotary_dim) each; both halves turn by the same angles.

        The sign of `rotate_half` is put into the sines, so that rotating is two multiplications.
        """
        angles = torch.outer(
            torch.arange(length, dtype=torch.float32), inverse_frequencies(self._config)
        )
        factor = self._config.attention_factor
        cos = (angles.cos() * factor).to(self._device, self._dtype)
        sin = (angles.sin() * factor).to(self._device, self._dtype)
        return cos.repeat(1, 2), torch.cat((-sin, sin), dim=-1)
