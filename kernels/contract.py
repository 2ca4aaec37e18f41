"""The signatures that the torch reference, the CPU and the Triton kernels share.

All tensors of a call lie on one device. Unless a signature says otherwise they have one floating
dtype, that of the calculation, and need not be contiguous. Inputs are never written to. What lies
behind a mask may hold anything, NaN included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .native import Native

__all__ = [
    "Activation",
    "Attention",
    "AttentionReceived",
    "DecodeAttention",
    "Deviation",
    "Gated",
    "Kernels",
    "RmsNorm",
    "RotateInto",
]

Activation = Literal["silu", "gelu_tanh"]


class Attention(Protocol):
    """Softmax attention where row i sees the keys j with `j <= positions[i]`, exactly."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Keys that no row sees are never read, or take no part whatever they hold.

        Args:
            q: (heads, n, head_dim), rotated; a run of heads / kv_heads heads shares a KV head.
            k: (kv_heads, m, head_dim), rotated; key j stands at position j.
            v: (kv_heads, m, head_dim).
            positions: int64 (n,), ascending, each below m.
            scale: multiplies the scores; head_dim ** -0.5 if None.
            window: with a window, also `positions[i] - j < window`.

        Returns:
            (n, heads * head_dim), the dtype of `q`.
        """
        ...


class AttentionReceived(Protocol):
    """Attention, and how much of it each key received from the query rows that count."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        *,
        rows: slice = slice(None),
        scale: float | None = None,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Attention` for what is not said here.

        Args:
            rows: which rows of `q` count, without a step.

        Returns:
            What `Attention` returns, and for each key the sum of its probability over all heads
            and the rows that count: (m,), float64 for float64 inputs and float32 otherwise. A key
            that none of these rows sees has 0.

        Raises:
            ValueError: `rows` has a step.
        """
        ...


class DecodeAttention(Protocol):
    """One row a sequence, each over the keys of its own sequence."""

    def __call__(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        lengths: Sequence[int],
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """The row of sequence i stands at position `lengths[i] - 1` and sees what is not behind it.

        Args:
            q: (heads, n, head_dim), rotated, one row a sequence.
            keys, values: n of each, (kv_heads, capacity, head_dim); capacities may differ.
            lengths: how many positions of each sequence are filled, the row's own included.
            scale, window: see `Attention`.

        Returns:
            (n, heads * head_dim), the dtype of `q`.
        """
        ...


class RotateInto(Protocol):
    """Un-rotated K to its positions in a cache, in one pass."""

    def __call__(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        out: Tensor,
        positions: slice | Tensor,
    ) -> None:
        """Convert `x` to the dtype of `out`, rotate it, and write it to `out[:, positions]`.

        Dimension d of the first `rotary_dim` becomes `x[d] * cos[d] + x[d ± half] * sin[d]`, half
        being `rotary_dim / 2`; the other dimensions stay as they are.

        Args:
            x: (kv_heads, n, head_dim), any floating dtype.
            cos, sin: (capacity or more, rotary_dim), dtype of `out`; row p belongs to position p.
                The first half of the sines is negated. None copies without rotating, as V needs.
            out: (kv_heads, capacity, head_dim).
            positions: a slice of n positions without a step, or int64 (n,), ascending.
        """
        ...


class Deviation(Protocol):
    """How far fresh K or V is from stored, a token."""

    def __call__(self, fresh: Tensor, stored: Tensor) -> Tensor:
        """The squared distance, summed over heads and dimensions.

        Args:
            fresh, stored: (kv_heads, n, head_dim), any floating dtypes.

        Returns:
            (n,), float64 if `fresh` is, float32 otherwise.
        """
        ...


class RmsNorm(Protocol):
    """Root mean square norm over the last dimension."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Calculated in the dtype of `weight`.

        Args:
            x: (..., size).
            weight: (size,), float32 or float64.

        Returns:
            The shape and dtype of `x`.
        """
        ...


class Gated(Protocol):
    """The gated activation of an MLP."""

    def __call__(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """`activation(gate) * up`.

        Args:
            gate_up: (n, 2 * size), the gates in front.

        Returns:
            (n, size).
        """
        ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of everything, chosen when a model is opened.

    name: torch, cpu, native (cpu with native code) or triton.
    native: the native code itself, for what is beyond these signatures; None without.
    """

    name: str
    attention: Attention
    attention_received: AttentionReceived
    decode_attention: DecodeAttention
    rotate_into: RotateInto
    deviation: Deviation
    rms_norm: RmsNorm
    gated: Gated
    native: Native | None = None
