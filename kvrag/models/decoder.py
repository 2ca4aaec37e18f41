"""Our own forward pass of a decoder, layer by layer.

Fusion slices rows, streams stored KV in and stops early, so the pass is taken apart here: a layer
projects rows to Q, K and V, and finishes them once somebody has computed their attention. The
decoder knows nothing of chunks, stores or sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvrag.kernels import Linear, attention, compute_dtype, linear
from kvrag.models.config import LayerConfig, ModelConfig, RopeConfig
from kvrag.models.rope import Rope
from kvrag.models.weights import Weights

__all__ = ["Decoder", "Layer"]

#: Rows that go through the MLP together: bounds the memory of the widest activation.
MLP_ROWS = 512


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, in at least float32."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


class Layer:
    """One transformer block over rows (n, hidden_size) of the compute dtype."""

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
        self._splits = [
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        ]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (heads, n, head_dim), K and V (kv_heads, n, head_dim), after q/k-norm, un-rotated."""
        c, norms = self._config, self._norms
        qkv = self._linears["qkv"](rms_norm(x, norms["input"], c.norm_eps))
        q, k, v = (
            part.view(x.shape[0], -1, c.head_dim).transpose(0, 1)
            for part in torch.split(qkv, self._splits, dim=-1)
        )
        if c.qk_norm:
            q = rms_norm(q, norms["q"], c.norm_eps)
            k = rms_norm(k, norms["k"], c.norm_eps)
        return q, k, v

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Q or K at its positions; unchanged where the layer has no RoPE."""
        return x if self._rope is None else self._rope.rotate(x, positions)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rows `x` after attention output `mixed` (n, heads * head_dim) and the MLP."""
        x = x + self._linears["output"](mixed)
        return torch.cat([self._mlp(rows) for rows in torch.split(x, MLP_ROWS)])

    def _mlp(self, x: Tensor) -> Tensor:
        h = rms_norm(x, self._norms["post"], self._config.norm_eps)
        gate, up = self._linears["gate_up"](h).chunk(2, dim=-1)
        return x + self._linears["down"](F.silu(gate).mul_(up))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Rotate `q` and attend over the cached `k`, `v`; the mask is the layer's own."""
        return attention(self.rotate(q, positions), k, v, positions, window=self.window)


class Decoder:
    """Embedding, layers and head of one model on one device.

    `dtype` is what weights are rounded to and KV blocks hold; `compute_dtype` is what activations
    and the KV cache of a request hold (see `kernels.precision`).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.compute_dtype = compute_dtype(dtype, self.device)
        hidden, vocab = config.hidden_size, config.vocab_size
        embedding = weights.take("model.embed_tokens.weight", vocab, hidden)
        self._embedding = self._stored(embedding)
        head = (
            self._embedding
            if config.tied_embeddings
            else self._stored(weights.take("lm_head.weight", vocab, hidden))
        )
        self._head = linear(head, None, self.compute_dtype)
        self._norm = self._norm_weight(weights.take("model.norm.weight", hidden))
        ropes: dict[RopeConfig, Rope] = {}
        self.layers = [
            Layer(
                i,
                config,
                self._rope(ropes, layer),
                self._norms(weights, i),
                self._linears(weights, i),
            )
            for i, layer in enumerate(config.layers)
        ]
        weights.check_all_taken()

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids int64 (n,) to rows (n, hidden_size)."""
        return self._embedding[token_ids].to(self.compute_dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Rows (n, hidden_size) of the last layer to float32 (float64) logits (n, vocab_size)."""
        logits = self._head(rms_norm(x, self._norm, self.config.norm_eps))
        return logits if logits.dtype is torch.float64 else logits.float()

    def _stored(self, tensor: Tensor) -> Tensor:
        """A weight rounded to the stored dtype."""
        return tensor.to(self.device, self.dtype)

    def _norm_weight(self, tensor: Tensor) -> Tensor:
        return self._stored(tensor).to(self.compute_dtype)

    def _rope(self, made: dict[RopeConfig, Rope], layer: LayerConfig) -> Rope | None:
        """Layers with the same RoPE share one table."""
        if layer.rope is None:
            return None
        if layer.rope not in made:
            made[layer.rope] = Rope(
                layer.rope,
                self.config.head_dim,
                self.config.max_positions,
                dtype=self.compute_dtype,
                device=self.device,
            )
        return made[layer.rope]

    def _norms(self, weights: Weights, index: int) -> dict[str, Tensor]:
        """One layer's norm weights."""
        c = self.config
        names = {
            "input": ("input_layernorm", c.hidden_size),
            "post": ("post_attention_layernorm", c.hidden_size),
        }
        if c.qk_norm:
            names["q"] = ("self_attn.q_norm", c.head_dim)
            names["k"] = ("self_attn.k_norm", c.head_dim)
        return {
            name: self._norm_weight(weights.take(f"model.layers.{index}.{stored}.weight", size))
            for name, (stored, size) in names.items()
        }

    def _linears(self, weights: Weights, index: int) -> dict[str, Linear]:
        """One layer's projections; those that read the same rows are joined into one product."""
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def joined(outputs: Mapping[str, int], inputs: int, *, bias: bool) -> Linear:
            def cat(kind: str, *shape: int) -> Tensor:
                return self._stored(
                    torch.cat(
                        [
                            weights.take(f"model.layers.{index}.{name}.{kind}", size, *shape)
                            for name, size in outputs.items()
                        ]
                    )
                )

            return linear(cat("weight", inputs), cat("bias") if bias else None, self.compute_dtype)

        qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        gate_up = {"mlp.gate_proj": c.mlp_size, "mlp.up_proj": c.mlp_size}
        return {
            "qkv": joined(qkv, c.hidden_size, bias=c.qkv_bias),
            "output": joined({"self_attn.o_proj": c.hidden_size}, q, bias=c.output_bias),
            "gate_up": joined(gate_up, c.hidden_size, bias=c.mlp_bias),
            "down": joined({"mlp.down_proj": c.hidden_size}, c.mlp_size, bias=c.mlp_bias),
        }

    def info(self) -> dict[str, Any]:
        """Numbers for people: family, layers, heads, positions and bytes of KV a token."""
        c = self.config
        return {
            "family": c.family,
            "layers": c.num_layers,
            "heads": c.num_heads,
            "kv_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "max_positions": c.max_positions,
            "kv_bytes_per_token": c.kv_elements_per_token * self.dtype.itemsize,
        }
