"""One transformer block, taken apart: rows to Q, K and V, and on once somebody has attended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvrag.kernels import Activation, Kernels, Linear
from kvrag.kernels.native import PlacedChunk, RowLayer, StoredKV, put_chunks, put_stored
from kvrag.models.config import ModelConfig
from kvrag.models.rope import Rope

__all__ = ["KERNEL_ACTIVATIONS", "Layer"]

#: Rows that go through the MLP together: bounds the memory of the widest activation.
MLP_ROWS = 512

#: What the kernels call the activations of configs.
KERNEL_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Layer:
    """One transformer block over rows (n, hidden_size) of the compute dtype.

    `norms` holds the weights of the norms that the family has, `linears` the four products, `rows`
    both in native code, where there is any.
    """

    def __init__(
        self,
        index: int,
        config: ModelConfig,
        rope: Rope | None,
        norms: Mapping[str, Tensor],
        linears: Mapping[str, Linear],
        kernels: Kernels,
        rows: RowLayer | None = None,
    ) -> None:
        self.index = index
        self.window = config.layers[index].window
        self._rope = rope
        self._config = config
        self._norms, self._linears, self._kernels = norms, linears, kernels
        self._rows = rows
        self._activation = KERNEL_ACTIVATIONS[config.activation]
        self._splits = [
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        ]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (heads, n, head_dim), K and V (kv_heads, n, head_dim), after q/k-norm, un-rotated."""
        if self._rows is not None:
            n, dim = x.shape[0], self._config.head_dim
            by_head = self._rows.project(x).view(n, -1, dim).transpose(0, 1)
            q, k, v = torch.split(by_head, [size // dim for size in self._splits])
            return q, k, v
        qkv = self._linears["qkv"](self._norm("before_attention", x))
        q, k, v = torch.split(qkv, self._splits, dim=-1)
        return self._heads("q", q), self._heads("k", k), self._heads("v", v)

    def rotate(self, x: Tensor, positions: slice | Tensor) -> Tensor:
        """Q or K at its positions; `x` itself where the layer has no RoPE.

        Here and below, positions in a tensor must have been reserved: `Decoder.reserve`.
        """
        return x if self._rope is None else self._rope.rotate(x, positions)

    def put(
        self, k: Tensor, v: Tensor, into_k: Tensor, into_v: Tensor, positions: slice | Tensor
    ) -> None:
        """Write un-rotated K and V to their place in a cache: K is rotated, dtypes are converted.

        Args:
            k, v: (kv_heads, n, head_dim), any floating dtype, on the cache's device.
            into_k, into_v: (kv_heads, capacity, head_dim); index equals position.
            positions: a slice of n positions, or int64 (n,), ascending.
        """
        if self._rope is None:
            self._kernels.rotate_into(k, None, None, into_k, positions)
        else:
            self._rope.rotate_into(k, into_k, positions)
        self._kernels.rotate_into(v, None, None, into_v, positions)

    def put_chunks(self, chunks: Sequence[PlacedChunk], into_k: Tensor, into_v: Tensor) -> None:
        """`put` for many chunks, each at positions that follow one another from a first one."""
        native = self._kernels.native
        if native is None:
            for k, v, start in chunks:
                self.put(k, v, into_k, into_v, slice(start, start + k.shape[1]))
            return
        end = max((start + k.shape[1] for k, _, start in chunks), default=0)
        tables = None if self._rope is None else self._rope.tables(end)
        put_chunks(native, chunks, tables, into_k, into_v)

    def put_stored(
        self, chunks: Sequence[tuple[StoredKV, int]], into_k: Tensor, into_v: Tensor
    ) -> list[int]:
        """`put_chunks` of chunks as they are stored; places of those that are not sound.

        Raises:
            RuntimeError: there is no native code, which alone does this.
        """
        native = self._kernels.native
        if native is None:
            raise RuntimeError("native code places stored chunks, and there is none")
        end = max((start + stored.shape[1] for stored, start in chunks), default=0)
        tables = None if self._rope is None else self._rope.tables(end)
        return put_stored(native, self.index, chunks, tables, into_k, into_v)

    def advance(self, x: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows `x` behind the whole block: `project`, `put`, `attend` and `finish`.

        Args:
            positions: int64 (n,), ascending and reserved.
            k, v: (kv_heads, m, head_dim), all positions up to the last row's.
        """
        if self._rows is not None:
            tables = None if self._rope is None else self._rope.tables(0)
            return self._rows.advance(x, positions, tables, k, v)
        q, own_k, own_v = self.project(x)
        self.put(own_k, own_v, k, v, positions)
        return self.finish(x, self.attend(q, k, v, positions))

    def first_visible(self, position: int) -> int:
        """The first position that a row at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Rotate `q` and attend over the cached `k`, `v`; the mask is the layer's own."""
        return self._kernels.attention(
            self.rotate(q, positions),
            k,
            v,
            positions,
            scale=self._config.attention_scale,
            window=self.window,
        )

    def attend_received(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `attend`, and for each key the attention (m,) that it received from all rows."""
        return self._kernels.attention_received(
            self.rotate(q, positions),
            k,
            v,
            positions,
            scale=self._config.attention_scale,
            window=self.window,
        )

    def attend_each(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        lengths: Sequence[int],
    ) -> Tensor:
        """Decoding: rotate row i of `q` to position `lengths[i] - 1` and attend over `keys[i]`.

        Args:
            q: (heads, n, head_dim), one row a sequence.
            keys, values: n of each, (kv_heads, capacity, head_dim).
            lengths: positions filled of each, the row's own included.

        Returns:
            (n, heads * head_dim).
        """
        positions: slice | Tensor = slice(lengths[0] - 1, lengths[0])
        if len(lengths) > 1:
            if self._rope is not None:
                self._rope.reserve(max(lengths))
            positions = torch.tensor(lengths, device=q.device) - 1
        return self._kernels.decode_attention(
            self.rotate(q, positions),
            keys,
            values,
            lengths,
            scale=self._config.attention_scale,
            window=self.window,
        )

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rows `x` after attention output `mixed` (n, heads * head_dim) and the MLP."""
        if self._rows is not None:
            return self._rows.finish(x, mixed)
        x = self._add(x, self._norm("after_attention", self._linears["output"](mixed)))
        return torch.cat([self._mlp(rows) for rows in torch.split(x, MLP_ROWS)])

    def _mlp(self, x: Tensor) -> Tensor:
        gate_up = self._linears["gate_up"](self._norm("before_mlp", x))
        gated = self._kernels.gated(gate_up, self._activation)
        return self._add(x, self._norm("after_mlp", self._linears["down"](gated)))

    def _add(self, x: Tensor, part: Tensor) -> Tensor:
        return torch.add(x, part, alpha=self._config.residual_scale)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """The norm of that name, or `x` where the family has none there."""
        weight = self._norms.get(name)
        return x if weight is None else self._kernels.rms_norm(x, weight, self._config.norm_eps)

    def _heads(self, name: str, x: Tensor) -> Tensor:
        """(n, heads * head_dim) to (heads, n, head_dim), after a norm of one or of all heads."""
        if (weight := self._norms.get(name)) is not None:
            x = self._norm(name, x.reshape(len(x), -1, len(weight)))
        return x.reshape(len(x), -1, self._config.head_dim).transpose(0, 1)
