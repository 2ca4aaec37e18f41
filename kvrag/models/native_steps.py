"""A model's layers as the native code for one row, and for many, takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvrag.kernels import Linear
from kvrag.kernels.native import (
    Int8Weights,
    LayerParts,
    LayersShape,
    Native,
    NativeLayers,
    Panels,
    Product,
    RowLayer,
)
from kvrag.models.config import ModelConfig
from kvrag.models.layer import KERNEL_ACTIVATIONS
from kvrag.models.projection import Projection

__all__ = ["int8_or_stored", "layer_parts", "native_layers", "row_layer"]

#: The parts of each projection of a layer.
_PARTS = {
    "qkv": ("q", "k", "v"),
    "output": ("output",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


def native_layers(
    native: Native, config: ModelConfig, layers: Sequence[LayerParts]
) -> NativeLayers:
    """The layers of a model of any family, for one row in float32."""
    return NativeLayers(native, _shape(config), layers)


def row_layer(
    native: Native,
    config: ModelConfig,
    norms: Mapping[str, Tensor],
    linears: Mapping[str, Linear],
    window: int | None,
) -> RowLayer | None:
    """One layer of such a model, for many rows; None where native code does not multiply."""
    panels = {name: product for name, product in linears.items() if isinstance(product, Panels)}
    if len(panels) < len(linears):
        return None
    return RowLayer(native, _shape(config), norms, panels, window)


def _shape(config: ModelConfig) -> LayersShape:
    return LayersShape(
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        mlp=config.mlp_size,
        activation=KERNEL_ACTIVATIONS[config.activation],
        norm_eps=config.norm_eps,
        attention_scale=config.attention_scale,
        residual_scale=config.residual_scale,
    )


def layer_parts(
    projections: Mapping[str, Projection],
    norms: Mapping[str, Tensor],
    *,
    rope: int | None,
    window: int | None,
    int8: bool,
) -> LayerParts:
    """What one layer calculates with: weights as they are stored, or in int8 where that can be."""
    products: dict[str, Product] = {}
    for joined, names in _PARTS.items():
        whole = projections[joined]
        # The product of many rows keeps float32 weights, but packs others anew.
        kept = whole.weight.dtype is torch.float32
        parts = torch.split(whole.weight, whole.sizes) if kept else whole.parts
        for name, weight, bias in zip(names, parts, whole.biases(), strict=True):
            products[name] = Product(
                int8_or_stored(weight) if int8 else weight.contiguous(),
                None if bias is None else bias.float(),
            )
    return LayerParts(products, norms, rope, window)


def int8_or_stored(weight: Tensor) -> Tensor | Int8Weights:
    """`weight` (out, in) in int8, or contiguous as it is if its rows cannot be cut into groups."""
    try:
        return Int8Weights.of(weight)
    except ValueError:
        return weight.contiguous()
