"""One transformer block, taken apart: rows to Q, K and V, and on once somebody has attended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kvrag.kernels import Linear, attention
from kvrag.models.config import ModelConfig
from kvrag.models.rope import Rope

__all__ = ["Layer", "rms_norm"]

#: Rows that go through the MLP together: bounds the memory of the widest activation.
MLP_ROWS = 512


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, in the dtype of `weight`."""
    wide = x.to(weight.dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


class Layer:
    """One transformer block over rows (n, hidden_size) of the compute dtype.

    `norms` holds the weights of the norms that the family has, `linears` the four products.
    """

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        rope: Rope | None,
        norms: Mapping[str, Tensor],
        linears: Mapping[str, Linear],
    ) -> None:
        self.index = index
        self.window = config.layers[index].window
        self._rope = rope
        self._config = config
        self._norms, self._linears = norms, linears
        self._activation = _ACTIVATIONS[config.activation]
        self._splits = [
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        ]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (heads, n, head_dim), K and V (kv_heads, n, head_dim), after q/k-norm, un-rotated."""
        qkv = self._linears["qkv"](self._norm("before_attention", x))
        q, k, v = torch.split(qkv, self._splits, dim=-1)
        return self._heads("q", q), self._heads("k", k), self._heads("v", v)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Q or K at its positions; `x` itself where the layer has no RoPE."""
        return x if self._rope is None else self._rope.rotate(x, positions)

    def first_visible(self, position: int) -> int:
        """The first position that a row at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Rotate `q` and attend over the cached `k`, `v`; the mask is the layer's own."""
        return attention(
            self.rotate(q, positions),
            k,
            v,
            positions,
            scale=self._config.attention_scale,
            window=self.window,
        )

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rows `x` after attention output `mixed` (n, heads * head_dim) and the MLP."""
        x = self._add(x, self._norm("after_attention", self._linears["output"](mixed)))
        return torch.cat([self._mlp(rows) for rows in torch.split(x, MLP_ROWS)])

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self._linears["gate_up"](self._norm("before_mlp", x)).chunk(2, dim=-1)
        return self._add(
            x, self._norm("after_mlp", self._linears["down"](self._activation(gate).mul_(up)))
        )

    def _add(self, x: Tensor, part: Tensor) -> Tensor:
        return torch.add(x, part, alpha=self._config.residual_scale)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """The norm of that name, or `x` where the family has none there."""
        weight = self._norms.get(name)
        return x if weight is None else rms_norm(x, weight, self._config.norm_eps)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        """(n, heads * head_dim) to (heads, n, head_dim), after a norm of one or of all heads."""
        if (weight := self._norms.get(name)) is not None:
            x = self._norm(name, x.reshape(len(x), -1, len(weight)))
        return x.reshape(len(x), -1, self._config.head_dim).transpose(0, 1)
