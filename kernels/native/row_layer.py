"""One layer's work on rows in one call of native code, or before and behind attention in one each.

From Python, norms, products and activations cost a few rows as much again as they take to run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import Structure, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .chunks import checked_places
from .layers import LayersShape
from .operations import LEAST_SHARED, Native
from .panels import Panels

__all__ = ["RowLayer"]

_NORMS = ("before_attention", "q", "k", "after_attention", "before_mlp", "after_mlp")
_PRODUCTS = ("qkv", "output", "gate_up", "down")
#: Rows that go through the MLP together: bounds the memory of the widest activation.
_MOST_ROWS = 512


class RowLayer:
    """What one layer does to rows (n, hidden); float32 on the CPU, thread-safe.

    A row's result depends on the number of threads not at all, and on other rows only in that
    `advance` may round otherwise: what blocks its keys are summed in is theirs, too.

    Args:
        norms: as `LayerParts.norms`.
        products: "qkv", "output", "gate_up" and "down", joined in this order, the gates in front.
        window: positions that a row sees, its own included; None is all up to it.

    Raises:
        ValueError: a weight has another shape, dtype or place than it must have.
    """

    def __init__(
        self,
        native: Native,
        shape: LayersShape,
        norms: Mapping[str, Tensor],
        products: Mapping[str, Panels],
        window: int | None = None,
    ) -> None:
        self._library, self._shape = native.library, shape
        self._kept = dict(norms), dict(products)
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._width = q + 2 * kv
        sizes = {
            "qkv": (shape.hidden, self._width),
            "output": (q, shape.hidden),
            "gate_up": (shape.hidden, 2 * shape.mlp),
            "down": (shape.mlp, shape.hidden),
        }
        self._layer = _RowLayer(
            hidden=shape.hidden, q_size=q, kv_size=kv, dim=shape.head_dim, mlp=shape.mlp,
            gelu=shape.activation == "gelu_tanh", least_shared=LEAST_SHARED, window=window or 0,
            norm_eps=shape.norm_eps, attention_scale=shape.attention_scale,
            residual_scale=shape.residual_scale,
        )  # fmt: skip
        for name in _PRODUCTS:
            panels = products[name]
            if (panels.inputs, panels.outputs) != sizes[name]:
                raise ValueError(
                    f"{name!r} maps {panels.inputs} to {panels.outputs} numbers, not "
                    f"{sizes[name][0]} to {sizes[name][1]}"
                )
            packed = _Packed(
                panels.dtype is torch.float16, panels.address, panels.bias_address, *sizes[name]
            )
            setattr(self._layer, name, packed)
        heads = {"q": (shape.head_dim, q), "k": (shape.head_dim, kv)}
        for name, weight in norms.items():
            sizes_here = heads.get(name, (shape.hidden,))
            fits = weight.dtype is torch.float32 and weight.is_cpu and weight.is_contiguous()
            if not fits or weight.ndim != 1 or weight.shape[0] not in sizes_here:
                raise ValueError(f"the norm {name!r} is {weight.dtype} {tuple(weight.shape)}")
            setattr(self._layer, f"{name}_norm", _Norm(weight.data_ptr(), weight.shape[0]))
        self._address = ctypes.addressof(self._layer)

    def advance(
        self,
        x: Tensor,
        positions: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        into_k: Tensor,
        into_v: Tensor,
    ) -> Tensor:
        """Rows (n, hidden) behind the whole layer, which sees their own K and V in the cache.

        Args:
            positions: int64 (n,), ascending. A row sees all keys up to its own, within the window.
            tables, into_k, into_v: see `put_chunks`; K, rotated, and V are written there.

        Raises:
            ValueError: something does not fit together; nothing has been written then.
        """
        s = self._shape
        x = _rows("x", x, s.hidden)
        n = x.shape[0]
        reach, turns = checked_places(tables, into_k, into_v)
        if (into_k.shape[0], into_k.shape[2]) != (s.kv_heads, s.head_dim):
            raise ValueError(f"k {tuple(into_k.shape)} is not ({s.kv_heads}, .., {s.head_dim})")
        if positions.dtype is not torch.int64 or positions.shape != (n,) or not positions.is_cpu:
            raise ValueError(f"{n} positions cannot be {positions.dtype} {positions.shape}")
        at, out, threads = positions.contiguous(), torch.empty(n, s.hidden), torch.get_num_threads()
        if n:
            scratch = torch.empty(
                self._library.advance_scratch(self._address, n, _MOST_ROWS, threads)
            )
            done = self._library.advance_rows(
                self._address, x.data_ptr(), n, at.data_ptr(), reach, *turns,
                into_k.data_ptr(), *into_k.stride()[:2], into_v.data_ptr(), *into_v.stride()[:2],
                _MOST_ROWS, out.data_ptr(), scratch.data_ptr(), threads,
            )  # fmt: skip
            if not done:
                raise ValueError(f"positions must ascend within 0 .. {reach - 1}, got {at}")
        return out

    def project(self, x: Tensor) -> Tensor:
        """Q, K and V of rows (n, hidden), after the norms of heads: (n, q + k + v).

        Raises:
            ValueError: `x` is another.
        """
        x = _rows("x", x, self._shape.hidden)
        n = x.shape[0]
        out = torch.empty(n, self._width)
        if n:
            scratch = torch.empty(n * self._shape.hidden)
            self._library.project_rows(
                self._address, x.data_ptr(), n, out.data_ptr(), scratch.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
        return out

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rows `x` (n, hidden) after attention output `mixed` (n, q) and the MLP.

        Raises:
            ValueError: a tensor is another, or `mixed` has other rows than `x`.
        """
        s = self._shape
        x, mixed = _rows("x", x, s.hidden), _rows("mixed", mixed, s.heads * s.head_dim)
        n = x.shape[0]
        if mixed.shape[0] != n:
            raise ValueError(f"mixed has {mixed.shape[0]} rows, and x {n}")
        out = torch.empty(n, s.hidden)
        if n:
            scratch = torch.empty(min(n, _MOST_ROWS) * (s.hidden + 3 * s.mlp))
            self._library.finish_rows(
                self._address, x.data_ptr(), mixed.data_ptr(), n, _MOST_ROWS, out.data_ptr(),
                scratch.data_ptr(), torch.get_num_threads(),
            )  # fmt: skip
        return out


class _Packed(Structure):
    _fields_ = (
        ("f16", c_int64),
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
    )


class _Norm(Structure):
    _fields_ = (("weight", c_void_p), ("size", c_int64))


class _RowLayer(Structure):
    _fields_ = (
        *((f"{name}_norm", _Norm) for name in _NORMS),
        *((name, _Packed) for name in _PRODUCTS),
        *(
            (name, c_int64)
            for name in (
                "hidden",
                "q_size",
                "kv_size",
                "dim",
                "mlp",
                "gelu",
                "least_shared",
                "window",
            )
        ),
        *((name, c_float) for name in ("norm_eps", "attention_scale", "residual_scale")),
    )


def _rows(name: str, x: Tensor, size: int) -> Tensor:
    """Contiguous."""
    if x.dtype is not torch.float32 or not x.is_cpu or x.ndim != 2 or x.shape[1] != size:
        raise ValueError(
            f"{name} must be float32 (n, {size}) on the CPU, got {x.dtype} {tuple(x.shape)} on "
            f"{x.device}"
        )
    return x.contiguous()
