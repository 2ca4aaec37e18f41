"""One row through all layers of a transformer in one call: the steps of decoding.

From Python each kernel costs as much again as it takes to run, some 330 times a token. So what
layers consist of is told to the C code once, and a step passes the row, the cache and the position.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_float, c_int64, c_void_p
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..contract import Activation
from .operations import INT8_GROUP, LEAST_SHARED, Int8Weights, Native

__all__ = ["LayerParts", "LayersShape", "NativeLayers", "Product"]

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_NORMS = ("before_attention", "q", "k", "after_attention", "before_mlp", "after_mlp")
_PRODUCTS = ("q", "k", "v", "output", "gate", "up", "down")


@dataclass(frozen=True, slots=True)
class LayersShape:
    """What all layers have in common.

    attention_scale multiplies the scores, residual_scale what attention and MLP add to the row.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    activation: Activation
    norm_eps: float
    attention_scale: float
    residual_scale: float


@dataclass(frozen=True, slots=True)
class Product:
    """`x @ weight.T + bias`; weight (out, in) in float32, bfloat16, float16 or int8."""

    weight: Tensor | Int8Weights
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What one layer calculates with.

    products: "q", "k", "v", "output", "gate", "up" and "down".
    norms: float32 weights of RMS norms: "before_attention", "q", "k", "after_attention",
        "before_mlp" and "after_mlp", each of which a layer may lack. "q" and "k" are of one head
        or of all heads.
    rope: which of the tables that a step is given; None turns nothing.
    window: a row sees this many positions up to its own; None for all.
    """

    products: Mapping[str, Product]
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    rope: int | None = None
    window: int | None = None


class NativeLayers:
    """The layers of one model; float32 on the CPU, thread-safe.

    Results equal those of the single kernels but for rounding, and do not depend on the number of
    threads. The weights are read where they lie, and kept.

    Raises:
        ValueError: a weight has another shape, dtype or place than it must have.
    """

    def __init__(self, native: Native, shape: LayersShape, layers: Sequence[LayerParts]) -> None:
        if shape.kv_heads < 1 or shape.heads % shape.kv_heads:
            raise ValueError(f"{shape.heads} heads cannot share {shape.kv_heads} KV heads")
        self._native, self._shape, self._layers = native, shape, list(layers)
        self._model = _Model(
            num_layers=len(layers),
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            dim=shape.head_dim,
            mlp=shape.mlp,
            gelu=shape.activation == "gelu_tanh",
            group=INT8_GROUP,
            least_shared=LEAST_SHARED,
            norm_eps=shape.norm_eps,
            attention_scale=shape.attention_scale,
            residual_scale=shape.residual_scale,
        )
        self._all = (_Layer * len(layers))(*(_layer(shape, layer) for layer in layers))
        self._num_tables = 1 + max((x.rope for x in layers if x.rope is not None), default=-1)

    def __call__(
        self, x: Tensor, kv: Tensor, position: int, tables: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The row behind the last layer: (1, hidden).

        Args:
            x: (1, hidden).
            kv: (layers, 2, kv_heads, capacity, head_dim), contiguous: K, rotated, and V of the
                positions before this one. The row's own are written to it.
            position: of the row.
            tables: cosines and sines, as for `RotateInto`, of each RoPE.

        Raises:
            ValueError: something does not fit together; nothing has been written then.
        """
        s, capacity = self._shape, kv.shape[3] if kv.ndim == 5 else 0
        expected = (len(self._layers), 2, s.kv_heads, capacity, s.head_dim)
        if not 0 <= position < capacity:
            raise ValueError(f"position {position} is not within a cache of {capacity}")
        _check("x", x, (1, s.hidden))
        _check("kv", kv, expected)
        if len(tables) < self._num_tables:
            raise ValueError(f"{self._num_tables} tables are needed, got {len(tables)}")
        turns = (_Table * len(tables))()
        for at, (cos, sin) in enumerate(tables):
            rotary = cos.shape[-1]
            _check("cos", cos, (cos.shape[0], rotary))
            _check("sin", sin, cos.shape)
            if position >= cos.shape[0] or rotary > s.head_dim or rotary % 2:
                raise ValueError(
                    f"cos and sin {tuple(cos.shape)} do not serve position {position} and "
                    f"{s.head_dim} dimensions"
                )
            turns[at] = _Table(cos.data_ptr(), sin.data_ptr(), rotary)
        out = x.clone()
        pieces = -(-(position + 1) // self._native.decode_piece)
        scratch = torch.empty(
            2 * s.hidden
            + 2 * (s.heads + s.kv_heads) * s.head_dim
            + 3 * s.mlp
            + pieces * s.heads * (s.head_dim + 2)
        )
        self._native.library.layers(
            ctypes.addressof(self._model), ctypes.addressof(self._all), ctypes.addressof(turns),
            out.data_ptr(), kv.data_ptr(), capacity, position, scratch.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out


class _Product(Structure):
    _fields_ = (
        ("kind", c_int64),
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
    )


class _Norm(Structure):
    _fields_ = (("weight", c_void_p), ("size", c_int64))


class _Layer(Structure):
    _fields_ = (
        *((f"{name}_norm", _Norm) for name in _NORMS),
        *((name, _Product) for name in _PRODUCTS),
        ("rope", c_int64),
        ("window", c_int64),
    )


class _Model(Structure):
    _fields_ = (
        *(
            (name, c_int64)
            for name in ("num_layers", "hidden", "heads", "kv_heads", "dim", "mlp", "gelu",
                         "group", "least_shared")
        ),
        *((name, c_float) for name in ("norm_eps", "attention_scale", "residual_scale")),
    )  # fmt: skip


class _Table(Structure):
    _fields_ = (("cos", c_void_p), ("sin", c_void_p), ("rotary", c_int64))


def _layer(s: LayersShape, parts: LayerParts) -> _Layer:
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    shapes = {
        "q": (q, s.hidden),
        "k": (kv, s.hidden),
        "v": (kv, s.hidden),
        "output": (s.hidden, q),
        "gate": (s.mlp, s.hidden),
        "up": (s.mlp, s.hidden),
        "down": (s.hidden, s.mlp),
    }
    sizes = {"q": (s.head_dim, q), "k": (s.head_dim, kv)}
    layer = _Layer(rope=-1 if parts.rope is None else parts.rope, window=parts.window or 0)
    for name in _PRODUCTS:
        setattr(layer, name, _product(name, parts.products[name], shapes[name]))
    for name, weight in parts.norms.items():
        if weight.shape[0] not in sizes.get(name, (s.hidden,)):
            raise ValueError(f"the norm {name!r} has {weight.shape[0]} numbers")
        _check(f"the norm {name!r}", weight, weight.shape[:1])
        setattr(layer, f"{name}_norm", _Norm(weight.data_ptr(), weight.shape[0]))
    return layer


def _product(name: str, product: Product, shape: tuple[int, int]) -> _Product:
    given, bias, scales = product.weight, product.bias, None
    weight = given.values if isinstance(given, Int8Weights) else given
    if isinstance(given, Int8Weights):
        scales = given.scales
    if weight.dtype not in _KINDS or (weight.dtype is torch.int8) != (scales is not None):
        raise ValueError(
            f"the weight {name!r} must be float32, bfloat16, float16 or Int8Weights, got "
            f"{weight.dtype}"
        )
    _check(f"the weight {name!r}", weight, shape, weight.dtype)
    if bias is not None:
        _check(f"the bias {name!r}", bias, shape[:1])
    return _Product(
        _KINDS[weight.dtype],
        weight.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        shape[1],
        shape[0],
    )


def _check(
    what: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> None:
    # A tuple compares with a torch.Size as such.
    if (
        tensor.dtype is not dtype
        or tensor.device.type != "cpu"
        or tensor.shape != tuple(shape)
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{what} must be contiguous {dtype} {tuple(shape)} on the CPU, got {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}"
        )
