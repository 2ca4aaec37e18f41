"""The native kernels as functions of torch tensors.

All calculate in float32 on the CPU, with as many threads as torch may use, without the interpreter
lock. Results do not depend on the number of threads, bit for bit. Inputs need not be contiguous.
What the arithmetic of NaN and infinity gives in torch, it gives here.

The methods check dtypes, devices and shapes (ValueError), since the C code checks nothing. They ask
for `shape[0]`, since `len` of a tensor takes a microsecond, and decoding calls these some 300 times
a token.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..contract import Activation

__all__ = ["Int8Weights", "Native", "threads_for"]

#: Numbers read or written below which a second thread costs more than it brings.
LEAST_SHARED = 1 << 16
#: Weights that share one scale in `Int8Weights`.
INT8_GROUP = 64
#: Rows that are rounded to int8 at a time.
_INT8_ROWS = 4096

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True, slots=True)
class Int8Weights:
    """A weight matrix as int8 (out, in) and float32 scales (out, in / INT8_GROUP).

    Raises:
        ValueError: a shape, dtype or place is another, or a tensor is not contiguous.
    """

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        # Here, so that the C code may trust every one that exists.
        values, scales = self.values, self.scales
        groups, rest = divmod(values.shape[-1], INT8_GROUP) if values.ndim == 2 else (0, 1)
        if rest:
            raise ValueError(
                f"int8 weights must be (out, in) with a multiple of {INT8_GROUP} inputs, got "
                f"{tuple(values.shape)}"
            )
        expected = {
            "values": (values, torch.int8, values.shape),
            "scales": (scales, torch.float32, (values.shape[0], groups)),
        }
        for name, (tensor, dtype, shape) in expected.items():
            fits = tensor.dtype is dtype and tensor.shape == tuple(shape)
            if not fits or tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(
                    f"the {name} of int8 weights must be contiguous {dtype} {tuple(shape)} on the "
                    f"CPU, got {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on "
                    f"{tensor.device}"
                )

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weights:
        """Round each weight by at most 1/254 of the greatest magnitude of its group.

        Args:
            weight: (out, in), any floating dtype, finite.

        Raises:
            ValueError: INT8_GROUP does not divide `in`, or a weight is not finite.
        """
        outputs, inputs = weight.shape
        if inputs % INT8_GROUP:
            raise ValueError(f"int8 weights need a multiple of {INT8_GROUP} inputs, got {inputs}")
        values = torch.empty(outputs, inputs, dtype=torch.int8)
        scales = torch.empty(outputs, inputs // INT8_GROUP)
        least = torch.finfo(torch.float32).tiny
        # In parts, since each is widened.
        parts = (torch.split(tensor, _INT8_ROWS) for tensor in (weight, values, scales))
        for given, rounded, scale in zip(*parts, strict=True):
            groups = given.float().view(*scale.shape, INT8_GROUP)
            scale.copy_(groups.abs().amax(dim=-1) / 127)
            # A group of zeros has scale 0 and stays zeros.
            scaled = groups / scale.clamp(min=least)[..., None]
            rounded.copy_(scaled.round_().view(rounded.shape))
        if not bool(scales.isfinite().all()):
            raise ValueError("int8 weights must be finite")
        return cls(values, scales)


class Native:
    """What one loaded library can do; made by `load`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.decode_piece = ctypes.c_int64.in_dll(library, "decode_piece").value

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Sequence[int],
        last: Sequence[int],
        out: Tensor,
        *,
        scale: float | None = None,
        received: Tensor | None = None,
        counted: range | None = None,
    ) -> None:
        """Softmax attention of rows that each see their own run of keys; all tensors are float32.

        Row i sees the keys `first[i] .. last[i] - 1`. Those that no row sees are never read if they
        lie before the first row's or behind the last row's; between them they may be read, and take
        no part if they are finite. A weight below 0.8e-38 times the greatest becomes 0; otherwise
        the relative error is that of a few roundings. K and V are read once for 48 rows of a KV
        head; on one thread for 64, where nobody asks what keys receive.

        Args:
            q: (heads, n, dim); a run of heads / kv_heads heads shares a KV head.
            k, v: (kv_heads, m, dim).
            first, last: n of each, ascending, `0 <= first < last <= m`.
            out: contiguous, n * heads * dim numbers; gets the mixed values (n, heads, dim).
            scale: multiplies the scores; dim ** -0.5 if None.
            received: (m,), contiguous; what each key is given, summed over all heads and the
                counted rows, is added to it.
            counted: which rows count, without a step; all if None.
        """
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            _check_in_place(name, tensor, 3)
        heads, n, dim = q.shape
        kv_heads, m = k.shape[:2]
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"{heads} heads cannot share {kv_heads} KV heads")
        if k.shape != v.shape or k.shape[2] != dim:
            raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must be (.., .., {dim})")
        fit = len(first) == len(last) == n
        fit = fit and all(0 <= a < b <= m for a, b in zip(first, last, strict=True))
        if not fit or any(list(bounds) != sorted(bounds) for bounds in (first, last)):
            raise ValueError(
                f"first and last must be {n}, ascend, and keep 0 <= first < last <= {m}"
            )
        _check("out", out)
        if out.numel() != n * heads * dim or not out.is_contiguous():
            raise ValueError(f"out {tuple(out.shape)} must be ({n}, {heads}, {dim}), contiguous")
        counted = range(n) if counted is None else counted
        if counted.step != 1 or counted.start < 0 or counted.stop > n:
            raise ValueError(f"{counted} must be within {n} rows, without a step")
        if out.numel() == 0:
            return
        begin, keys = first[0], last[-1] - first[0]
        given = 0
        if received is not None:
            _check_in_place("received", received, 1)
            if received.shape[0] != m:
                raise ValueError(f"received has {received.shape[0]} numbers for {m} keys")
            given = received[begin:].data_ptr()
        shape = (n, heads, kv_heads, dim)
        threads = threads_for(2 * kv_heads * dim * keys)
        scratch = torch.empty(self.library.attend_scratch(*shape, keys if given else 0, threads))
        strides = [s for x in (q, k, v) for s in x.stride()[:2]]
        numbers = array("q", [*strides, *first, *last])
        base = numbers.buffer_info()[0]
        self.library.attend(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), base, *shape, base + 48, base + 48 + 8 * n,
            dim**-0.5 if scale is None else scale, counted.start, counted.stop, given or None,
            scratch.data_ptr(), out.data_ptr(), threads,
        )  # fmt: skip

    def rotate_into(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        out: Tensor,
        positions: slice | Tensor,
    ) -> None:
        """See `RotateInto`; `out`, `cos` and `sin` are float32, `x` float32, bfloat16 or float16.

        `out` may be the memory of `x` where both have the same layout and position.
        """
        _check_in_place("out", out, 3)
        self._rotate(x, cos, sin, out, positions, packed=False)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, positions: slice | Tensor) -> Tensor:
        """`x` (heads, n, dim) turned to its positions: a new float32 tensor. See `rotate_into`."""
        out = torch.empty(x.shape)
        self._rotate(x, cos, sin, out, positions, packed=True)
        return out

    def _rotate(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        out: Tensor,
        positions: slice | Tensor,
        *,
        packed: bool,
    ) -> None:
        if x.dtype not in _SUFFIXES or x.device.type != "cpu" or x.ndim != 3:
            raise ValueError(f"cannot rotate {x.dtype} {tuple(x.shape)} on {x.device}")
        x = _rows(x)
        heads, n, dim = x.shape
        reach = cos.shape[0] if packed and cos is not None else out.shape[1]
        at, start, end = self._placed(positions, reach)
        if (out.shape[0], out.shape[2]) != (heads, dim) or (n if at is None else at.shape[0]) != n:
            raise ValueError(f"x {tuple(x.shape)} does not fit into out {tuple(out.shape)}")
        if at is None and end - start != n:
            raise ValueError(f"positions {start} .. {end - 1} are not {n}")
        if x.numel() == 0:
            return
        rotary, tables = 0, (0, 0)
        if cos is not None and sin is not None:
            _check_in_place("cos", cos, 2)
            _check_in_place("sin", sin, 2)
            cos, sin = cos.contiguous(), sin.contiguous()
            rotary = cos.shape[1]
            if cos.shape != sin.shape or rotary > dim or rotary % 2 or cos.shape[0] < end:
                raise ValueError(
                    f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not serve {end} "
                    f"positions and {dim} dimensions"
                )
            tables = (cos.data_ptr(), sin.data_ptr())
        getattr(self.library, f"rotate_into_{_SUFFIXES[x.dtype]}")(
            x.data_ptr(), heads, n, dim, x.stride(0), x.stride(1), *tables, rotary,
            None if at is None else at.data_ptr(), start,
            out.data_ptr(), out.stride(0), out.stride(1), packed, threads_for(x.numel()),
        )  # fmt: skip

    def _placed(self, positions: slice | Tensor, reach: int) -> tuple[Tensor | None, int, int]:
        """(positions or None, the first, one behind the last), all below `reach`."""
        if isinstance(positions, slice):
            start, end, step = positions.indices(reach)
            if step != 1:
                raise ValueError(f"positions {positions!r} must have no step")
            return None, start, max(start, end)
        if positions.dtype is not torch.int64 or positions.ndim != 1 or not positions.is_cpu:
            raise ValueError(
                f"positions must be int64 (n,), got {positions.dtype} {positions.shape}"
            )
        if positions.shape[0] == 0:
            return positions, 0, 0
        at, found = positions.contiguous(), (ctypes.c_int64 * 2)()
        self.library.bounds(at.data_ptr(), at.shape[0], ctypes.addressof(found))
        low, high = found
        if low < 0 or high >= reach:
            raise ValueError(f"positions {low} .. {high} are not within 0 .. {reach - 1}")
        return at, low, high + 1

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `RmsNorm`; `x` and `weight` are float32."""
        _check("x", x)
        _check_in_place("weight", weight, 1)
        size = weight.shape[0]
        if x.shape[-1] != size:
            raise ValueError(f"x {tuple(x.shape)} has not the {size} columns of the weight")
        rows = _rows(x.reshape(-1, size))
        out = torch.empty(x.shape)
        if x.numel():
            self.library.rms_norm(
                rows.data_ptr(), rows.shape[0], size, rows.stride(0), weight.data_ptr(), eps,
                out.data_ptr(), size, threads_for(x.numel()),
            )  # fmt: skip
        return out

    def gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """See `Gated`; `gate_up` is float32. The relative error is that of a few roundings."""
        _check("gate_up", gate_up)
        if gate_up.ndim != 2 or gate_up.shape[1] % 2:
            raise ValueError(f"gate_up must be (n, 2 * size), got {tuple(gate_up.shape)}")
        rows = _rows(gate_up)
        n, size = rows.shape[0], rows.shape[1] // 2
        out = torch.empty(n, size)
        function = self.library.gated_silu if activation == "silu" else self.library.gated_gelu_tanh
        if out.numel():
            function(
                rows.data_ptr(), n, size, rows.stride(0), out.data_ptr(), size,
                threads_for(rows.numel()),
            )  # fmt: skip
        return out

    def decode_attention(
        self,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        lengths: Sequence[int],
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """See `DecodeAttention`; all tensors are float32, `scale` is positive.

        K and V are read once.
        """
        _check("q", q)
        heads, n, dim = q.shape
        if not len(keys) == len(values) == len(lengths) == n:
            raise ValueError(
                f"{n} rows need {n} keys, values and lengths, got {len(keys)}, {len(values)} and "
                f"{len(lengths)}"
            )
        scale = dim**-0.5 if scale is None else scale
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        if n == 0:
            return torch.empty(0, heads * dim)
        kv_heads = keys[0].shape[0]
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"{heads} heads cannot share {kv_heads} KV heads")
        for k, v, length in zip(keys, values, lengths, strict=True):
            _check_in_place("keys", k, 3)
            _check_in_place("values", v, 3)
            if not k.shape == v.shape == (kv_heads, k.shape[1], dim):
                raise ValueError(
                    f"keys {tuple(k.shape)} and values {tuple(v.shape)} must be "
                    f"({kv_heads}, capacity, {dim})"
                )
            if not 1 <= length <= k.shape[1]:
                raise ValueError(f"a length must be in 1 .. {k.shape[1]}, got {length}")
        first = [0 if window is None else max(0, length - window) for length in lengths]
        pieces = [-(-(e - b) // self.decode_piece) for b, e in zip(first, lengths, strict=True)]
        before = list(accumulate(pieces, initial=0))
        rows = q.transpose(0, 1).contiguous()
        # One array of everything: pointers, strides and bounds, by sequence.
        pairs = zip(keys, values, strict=True)
        strides = [s for k, v in pairs for s in (*k.stride()[:2], *v.stride()[:2])]
        lists = (
            [k.data_ptr() for k in keys],
            [v.data_ptr() for v in values],
            strides,
            first,
            lengths,
            before,
        )
        numbers = array("q", [number for part in lists for number in part])
        base = numbers.buffer_info()[0]
        starts = [base + 8 * at for at in (0, n, 2 * n, 6 * n, 7 * n, 8 * n)]
        states = torch.empty(before[-1] * heads * (dim + 2))
        out = torch.empty(n, heads * dim)
        work = 2 * kv_heads * dim * sum(e - b for b, e in zip(first, lengths, strict=True))
        self.library.decode(
            rows.data_ptr(), n, heads, kv_heads, dim, *starts, scale, states.data_ptr(),
            out.data_ptr(), threads_for(work),
        )  # fmt: skip
        return out

    def gemv(self, weight: Tensor | Int8Weights, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """One row (1, in) times a weight matrix (out, in), plus bias (out,): (1, out).

        Args:
            weight: contiguous bfloat16 or float16, or int8 with its scales; used as it is stored.
                (torch is as fast for float32.)
            x: float32.
            bias: float32, contiguous.
        """
        values = weight.values if isinstance(weight, Int8Weights) else weight
        outputs, inputs = values.shape
        _check("x", x)
        if x.shape != (1, inputs) or not values.is_contiguous() or values.device.type != "cpu":
            raise ValueError(
                f"x {tuple(x.shape)} must be (1, {inputs}), and the weight contiguous on the CPU"
            )
        if bias is not None:
            _check_in_place("bias", bias, 1)
            if bias.shape[0] != outputs:
                raise ValueError(f"bias has {bias.shape[0]} numbers for {outputs} outputs")
        x, out = _rows(x), torch.empty(1, outputs)
        tail = (
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            threads_for(values.numel()),
        )
        if isinstance(weight, Int8Weights):
            self.library.gemv_i8(
                x.data_ptr(), values.data_ptr(), weight.scales.data_ptr(), inputs, outputs,
                INT8_GROUP, *tail,
            )  # fmt: skip
        elif values.dtype in (torch.bfloat16, torch.float16):
            getattr(self.library, f"gemv_{_SUFFIXES[values.dtype]}")(
                x.data_ptr(), values.data_ptr(), inputs, outputs, *tail
            )
        else:
            raise ValueError(f"gemv takes bfloat16, float16 or int8 weights, got {values.dtype}")
        return out


def threads_for(numbers: int) -> int:
    """How many threads work on so many numbers that are read or written."""
    return 1 if numbers < LEAST_SHARED else torch.get_num_threads()


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}; native kernels take float32 on the CPU"
        )


def _check_in_place(name: str, tensor: Tensor, ndim: int) -> None:
    """For what is written, or is too large to copy."""
    _check(name, tensor)
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got {tuple(tensor.shape)}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"the last dimension of {name} must be contiguous")


def _rows(tensor: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()
