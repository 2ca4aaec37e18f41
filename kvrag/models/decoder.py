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

from kvrag.kernels import attention, compute_dtype
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
        self, index: int, config: ModelConfig, rope: Rope | None, tensors: Mapping[str, Tensor]
    ) -> None:
        self.index = index
        self.window = config.layers[index].window
        self._rope = rope
        self._config = config
        self._t = tensors
        self._splits = [
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        ]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (heads, n, head_dim), K and V (kv_heads, n, head_dim), after q/k-norm, un-rotated."""
        c, t = self._config, self._t
        h = rms_norm(x, t["input_norm"], c.norm_eps)
        qkv = F.linear(h, t["qkv"], t.get("qkv_bias"))
        q, k, v = (
            part.view(x.shape[0], -1, c.head_dim).transpose(0, 1)
            for part in torch.split(qkv, self._splits, dim=-1)
        )
        if c.qk_norm:
            q = rms_norm(q, t["q_norm"], c.norm_eps)
            k = rms_norm(k, t["k_norm"], c.norm_eps)
        return q, k, v

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Q or K at its positions; unchanged where the layer has no RoPE."""
        return x if self._rope is None else self._rope.rotate(x, positions)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rows `x` after attention output `mixed` (n, heads * head_dim) and the MLP."""
        t = self._t
        x = x + F.linear(mixed, t["output"], t.get("output_bias"))
        return torch.cat([self._mlp(rows) for rows in torch.split(x, MLP_ROWS)])

    def _mlp(self, x: Tensor) -> Tensor:
        t = self._t
        h = rms_norm(x, t["post_norm"], self._config.norm_eps)
        gate, up = F.linear(h, t["gate_up"], t.get("gate_up_bias")).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate).mul_(up), t["down"], t.get("down_bias"))

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
        self._embedding = self._place(embedding)
        self._head = (
            self._embedding
            if config.tied_embeddings
            else self._place(weights.take("lm_head.weight", vocab, hidden))
        )
        self._norm = self._place(weights.take("model.norm.weight", hidden))
        ropes: dict[RopeConfig, Rope] = {}
        self.layers = [
            Layer(i, config, self._rope(ropes, layer), self._layer_tensors(weights, i))
            for i, layer in enumerate(config.layers)
        ]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids int64 (n,) to rows (n, hidden_size)."""
        return self._embedding[token_ids]

    def logits(self, x: Tensor) -> Tensor:
        """Rows (n, hidden_size) of the last layer to float32 (float64) logits (n, vocab_size)."""
        logits = F.linear(rms_norm(x, self._norm, self.config.norm_eps), self._head)
        return logits if logits.dtype is torch.float64 else logits.float()

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype).to(self.compute_dtype)

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

    def _layer_tensors(self, weights: Weights, index: int) -> dict[str, Tensor]:
        """One layer's tensors; projections that read the same rows are joined into one product."""
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def take(name: str, *shape: int) -> Tensor:
            return weights.take(f"model.layers.{index}.{name}", *shape)

        def joined(names: Mapping[str, int], kind: str, *shape: int) -> Tensor:
            return self._place(
                torch.cat([take(f"{n}.{kind}", s, *shape) for n, s in names.items()])
            )

        qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        output = {"self_attn.o_proj": c.hidden_size}
        gate_up = {"mlp.gate_proj": c.mlp_size, "mlp.up_proj": c.mlp_size}
        down = {"mlp.down_proj": c.hidden_size}
        tensors = {
            "input_norm": self._place(take("input_layernorm.weight", c.hidden_size)),
            "post_norm": self._place(take("post_attention_layernorm.weight", c.hidden_size)),
            "qkv": joined(qkv, "weight", c.hidden_size),
            "output": joined(output, "weight", q),
            "gate_up": joined(gate_up, "weight", c.hidden_size),
            "down": joined(down, "weight", c.mlp_size),
        }
        if c.qkv_bias:
            tensors["qkv_bias"] = joined(qkv, "bias")
        if c.output_bias:
            tensors["output_bias"] = joined(output, "bias")
        if c.mlp_bias:
            tensors["gate_up_bias"] = joined(gate_up, "bias")
            tensors["down_bias"] = joined(down, "bias")
        if c.qk_norm:
            tensors["q_norm"] = self._place(take("self_attn.q_norm.weight", c.head_dim))
            tensors["k_norm"] = self._place(take("self_attn.k_norm.weight", c.head_dim))
        return tensors

    def info(self) -> dict[str, Any]:
        """Numbers for people: family, layers, parameters and bytes of KV a token."""
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
