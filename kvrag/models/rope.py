"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and their long-context variants.

linear: position interpolation (arXiv 2306.15595). llama3: as Llama 3.1 has it. yarn: arXiv
2309.00071. longrope: arXiv 2402.13753.

Angles are computed in float32, as the models were trained, whatever the compute dtype is. K is
stored un-rotated and rotated here when its place in the prompt is known, which is exact for every
variant that depends on the position alone.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from kvrag.kernels import Kernels, choose
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

    Positions in a slice are asked for by that; those in a tensor must have been `reserve`d.
    Thread-safe: a longer table takes the place of the shorter one, with the same numbers in it.
    """

    def __init__(
        self,
        config: RopeConfig,
        max_positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> None:
        """`kernels`: None chooses for the device."""
        self._config, self._max_positions = config, max_positions
        self._dtype, self._device = dtype, device
        self._kernels = kernels or choose("auto", device, dtype)
        self._tables = self._computed(min(_FIRST_POSITIONS, max_positions))
        # A captured CUDA graph goes on reading the tables that it began with.
        self._outgrown: list[tuple[Tensor, Tensor]] = []
        self._growing = threading.Lock()

    def reserve(self, length: int) -> None:
        """Have the tables reach over positions below `length`.

        Raises:
            IndexError: the model has fewer positions.
        """
        if length > self._max_positions:
            raise IndexError(f"position {length - 1} of a model of {self._max_positions} positions")
        if length <= len(self._tables[0]):
            return
        with self._growing:
            tables = self._tables
            if length > len(tables[0]):
                self._outgrown.append(tables)
                longer = min(max(length, 2 * len(tables[0])), self._max_positions)
                self._tables = self._computed(longer)

    def rotate(self, x: Tensor, positions: slice | Tensor) -> Tensor:
        """Turn `x` (heads, n, head_dim) to `positions`; a new tensor.

        Args:
            positions: a slice of n positions, or int64 (n,), reserved.

        Raises:
            IndexError: a position of the slice is beyond the model's last.
        """
        cos, sin = self._tables_for(positions)
        if (native := self._kernels.native) is not None:
            return native.rotate(x, cos, sin, positions)
        out = x.new_empty(x.shape)
        rows = slice(0, x.shape[1])
        self._kernels.rotate_into(x, cos[positions], sin[positions], out, rows)
        return out

    def rotate_into(self, x: Tensor, out: Tensor, positions: slice | Tensor) -> None:
        """Turn `x` (heads, n, head_dim), any floating dtype, and write it to `out[:, positions]`.

        Args:
            out: (heads, capacity, head_dim).
            positions: a slice of n positions, or int64 (n,), ascending and reserved.

        Raises:
            IndexError: a position of the slice is beyond the model's last.
        """
        self._kernels.rotate_into(x, *self._tables_for(positions), out, positions)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions below `length` and of some more, as `RotateInto` says.

        Raises:
            IndexError: the model has fewer positions.
        """
        self.reserve(length)
        return self._tables

    def _tables_for(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        # A look at positions in a tensor would wait for a GPU: who has them has reserved them.
        if isinstance(positions, slice):
            self.reserve(positions.stop)
        return self._tables

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
