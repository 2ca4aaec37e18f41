"""Our own forward pass of a decoder, layer by layer.

Fusion slices rows, streams stored KV in and stops early, so the pass is taken apart here: a layer
projects rows to Q, K and V, and finishes them once somebody has computed their attention. The
decoder knows nothing of chunks, stores or sampling.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.kernels import (
    Int8Decoding,
    Kernels,
    KernelsUnavailableError,
    choose,
    compute_dtype,
    linear,
)
from kvrag.kernels.linear import OneRow, row_major
from kvrag.kernels.native import Int8Weights, LayerParts, NativeLayers
from kvrag.models.config import LayerConfig, ModelConfig
from kvrag.models.layer import Layer
from kvrag.models.native_steps import (
    int8_or_stored,
    layer_parts,
    native_layers,
    row_layer,
)
from kvrag.models.projection import Projection, projection
from kvrag.models.rope import Rope
from kvrag.models.rope_config import RopeConfig
from kvrag.models.weights import Weights

__all__ = ["Decoder", "Layer"]


class Decoder:
    """Embedding, layers and head of one model on one device.

    `dtype` is what weights are rounded to and KV blocks hold; `compute_dtype` is what activations
    and the KV cache of a request hold (see `kernels.precision`).

    Args:
        int8_decoding: `stepping` multiplies int8 weights; nothing else does, so that what is
            stored does not depend on it.
        kernels, kernels_dir: what calculates, by name, and the folder of its native code; see
            `kernels.choose`. Results differ by rounding alone. With native code `step` works, for
            which each layer's weights stay as they are stored, 2 bytes a weight in bfloat16,
            beside what many rows are multiplied with; as int8 if `int8_decoding`, and then in
            `stepping` alone. Tensors whose file has that dtype are read where it is mapped.

    Raises:
        ModelError: a tensor is missing or of another shape.
        UnsupportedModelError: int8 decoding or the kernels cannot run here.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        int8_decoding: bool = False,
        kernels: str = "auto",
        kernels_dir: Path | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.compute_dtype = compute_dtype(dtype, self.device)
        self.kernels = self._chosen(kernels, kernels_dir)
        hidden, vocab = config.hidden_size, config.vocab_size
        embedding = weights.take("model.embed_tokens.weight", vocab, hidden)
        self._embedding = self._stored(embedding)
        head = self._embedding
        if not config.tied_embeddings:
            head = self._stored(weights.take("lm_head.weight", vocab, hidden))
        elif "lm_head.weight" in weights:
            stored = weights.take("lm_head.weight", vocab, hidden)
            if not torch.equal(stored, embedding):
                raise ModelError(
                    "the config ties the head to the embedding (tie_word_embeddings), but the "
                    "weights hold a tensor 'lm_head.weight' that differs from "
                    "'model.embed_tokens.weight'"
                )
        native = self.kernels.native
        bags = self._int8_bags() if int8_decoding and native is None else None
        self._head = row_major(head, self.compute_dtype, native)
        # A number of the compute dtype, as the families that scale were trained.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=self.compute_dtype)
        self._norm = self._norm_weight(weights.take("model.norm.weight", hidden))
        ropes: dict[RopeConfig, Rope] = {}
        self.layers: list[Layer] = []
        bag_layers: list[Layer] = []
        native_parts: list[LayerParts] = []
        for index, layer in enumerate(config.layers):
            rope, norms = self._rope(ropes, layer), self._norms(weights, index)
            projections = self._projections(weights, index)
            full = {
                name: linear(p.weight, p.bias, self.compute_dtype, native)
                for name, p in projections.items()
            }
            rows = None
            if native is not None:
                rows = row_layer(native, config, norms, full, layer.window)
            self.layers.append(Layer(index, config, rope, norms, full, self.kernels, rows))
            if native is not None:
                table = None if layer.rope is None else list(ropes).index(layer.rope)
                native_parts.append(
                    layer_parts(
                        projections, norms, rope=table, window=layer.window, int8=int8_decoding
                    )
                )
            elif bags is not None:
                step = {
                    name: bags.linear(p.weight, p.bias, full[name])
                    for name, p in projections.items()
                }
                bag_layers.append(Layer(index, config, rope, norms, step, self.kernels))
        self._ropes = list(ropes.values())
        weights.check_all_taken()
        self._native_layers: NativeLayers | None = None
        self._stepping = copy.copy(self) if int8_decoding else None
        if native is not None:
            stepping = self._stepping or self
            stepping._native_layers = native_layers(native, config, native_parts)
            rounded = int8_or_stored(head) if int8_decoding else None
            if isinstance(rounded, Int8Weights):
                stepping._head = OneRow(native, rounded, self._head)
        elif self._stepping is not None and bags is not None:
            self._stepping.layers = bag_layers
            self._stepping._head = bags.linear(head, None, self._head)

    @property
    def stepping(self) -> Decoder:
        """What continues a prompt a token at a time; shares all but the products with this one."""
        return self._stepping or self

    @property
    def steps_natively(self) -> bool:
        """Whether `step` works here."""
        return self._native_layers is not None

    def step(self, x: Tensor, kv: Tensor, position: int) -> Tensor:
        """One row through all layers, in one call of native code.

        Args:
            x: (1, hidden_size).
            kv: `KVCache.kv` with a capacity beyond `position`; the row's K and V are written to it.

        Returns:
            (1, hidden_size), behind the last layer.
        """
        if self._native_layers is None:
            raise ModelError("a step in one call needs native code, and there is none here")
        tables = [rope.tables(position + 1) for rope in self._ropes]
        return self._native_layers(x, kv, position, tables)

    def reserve(self, length: int) -> None:
        """Be ready to rotate to positions below `length` that come in tensors.

        Raises:
            IndexError: the model has fewer positions.
        """
        for rope in self._ropes:
            rope.reserve(length)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids int64 (n,) to rows (n, hidden_size)."""
        return self._embedding[token_ids].to(self.compute_dtype) * self._embedding_scale

    def logits(self, x: Tensor) -> Tensor:
        """Rows (n, hidden_size) of the last layer to float32 (float64) logits (n, vocab_size)."""
        logits = self._head(self.kernels.rms_norm(x, self._norm, self.config.norm_eps))
        wide = logits if logits.dtype is torch.float64 else logits.float()
        return wide.div_(self.config.logits_scaling)

    def _chosen(self, name: str, native_folder: Path | None) -> Kernels:
        try:
            return choose(name, self.device, self.compute_dtype, native_folder=native_folder)
        except KernelsUnavailableError as exc:
            raise UnsupportedModelError(f"kernels {name!r} are not possible here: {exc}") from exc

    def _int8_bags(self) -> Int8Decoding:
        try:
            return Int8Decoding(self.compute_dtype, self.device)
        except ValueError as exc:
            raise UnsupportedModelError(
                f"decode_weights 'int8' is not possible here: {exc}"
            ) from exc

    def _stored(self, tensor: Tensor) -> Tensor:
        """A weight rounded to the stored dtype."""
        return tensor.to(self.device, self.dtype)

    def _norm_weight(self, tensor: Tensor) -> Tensor:
        """In at least float32, which norms are calculated in."""
        wide = torch.float64 if self.compute_dtype is torch.float64 else torch.float32
        return self._stored(tensor).to(wide) + self.config.norm_offset

    def _rope(self, made: dict[RopeConfig, Rope], layer: LayerConfig) -> Rope | None:
        """Layers with the same RoPE share one table."""
        if layer.rope is None:
            return None
        if layer.rope not in made:
            made[layer.rope] = Rope(
                layer.rope,
                self.config.max_positions,
                dtype=self.compute_dtype,
                device=self.device,
                kernels=self.kernels,
            )
        return made[layer.rope]

    def _norms(self, weights: Weights, index: int) -> dict[str, Tensor]:
        """One layer's norm weights."""
        c = self.config
        names = {
            place: (stored, c.hidden_size)
            for place, stored in asdict(c.norms).items()
            if stored is not None
        }
        if c.qk_norm is not None:
            together = c.qk_norm == "all_heads"
            names["q"] = ("self_attn.q_norm", c.head_dim * (c.num_heads if together else 1))
            names["k"] = ("self_attn.k_norm", c.head_dim * (c.num_kv_heads if together else 1))
        return {
            place: self._norm_weight(weights.take(f"model.layers.{index}.{stored}.weight", size))
            for place, (stored, size) in names.items()
        }

    def _projections(self, weights: Weights, index: int) -> dict[str, Projection]:
        """One layer's projections; those that read the same rows are joined into one product."""
        c = self.config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

        def take(name: str, *shape: int) -> Tensor:
            return self._stored(weights.take(f"model.layers.{index}.{name}", *shape))

        def joined(
            names: dict[str, int], inputs: int, *, bias: bool, fused: str | None = None
        ) -> Projection:
            whole = fused if c.fused_weights else None
            return projection(take, names, inputs, bias=bias, fused=whole)

        return {
            "qkv": joined(
                {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
                c.hidden_size,
                bias=c.qkv_bias,
                fused="self_attn.qkv_proj",
            ),
            "output": joined({"self_attn.o_proj": c.hidden_size}, q, bias=c.output_bias),
            "gate_up": joined(
                {"mlp.gate_proj": c.mlp_size, "mlp.up_proj": c.mlp_size},
                c.hidden_size,
                bias=c.mlp_bias,
                fused="mlp.gate_up_proj",
            ),
            "down": joined({"mlp.down_proj": c.hidden_size}, c.mlp_size, bias=c.mlp_bias),
        }
