"""What a freshly loaded library must prove: that it calculates what torch calculates."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor

from ..errors import KernelsUnavailableError
from .chunks import put_chunks
from .layers import LayerParts, LayersShape, NativeLayers, Product
from .operations import INT8_GROUP, Int8Weights, Native
from .panels import Panels
from .unpack import NativeUnpack

__all__ = ["check"]


def check(native: Native) -> None:
    """One small case of every kernel; milliseconds.

    Raises:
        KernelsUnavailableError: a kernel is wrong on this machine; the message names it.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    # Rows of more than one task, keys of more than one block.
    q, k, v = draw(6, 15, 13), draw(2, 90, 13), draw(2, 90, 13)
    at, keys = torch.arange(75, 90), torch.arange(90)
    hidden = (keys > at[:, None]) | (keys <= at[:, None] - 72)
    scores = (q.view(2, 45, 13) @ k.transpose(1, 2)).masked_fill(hidden.repeat(3, 1), float("-inf"))
    weights = scores.softmax(-1)
    out, received = torch.empty(15, 6, 13), torch.zeros(90)
    native.attend(
        q, k, v, range(4, 19), range(76, 91), out, scale=1.0, received=received, counted=range(15)
    )
    _agree("attention", out.transpose(0, 1).reshape(2, 45, 13), weights @ v)
    _agree("attention received", received, weights.sum((0, 1)))

    cos, sin = draw(9, 20), draw(9, 20)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, out = draw(2, 3, 26, dtype=dtype), torch.zeros(2, 9, 26)
        native.rotate_into(x, cos, sin, out, torch.tensor([1, 4, 8]))
        wide = x.float()
        swapped = torch.cat((wide[..., 10:20], wide[..., :10]), -1)
        turned = wide[..., :20] * cos[[1, 4, 8]] + swapped * sin[[1, 4, 8]]
        _agree("rotate_into", out[:, [1, 4, 8]], torch.cat((turned, wide[..., 20:]), -1))
        k, v = torch.zeros(2, 9, 26), torch.zeros(2, 9, 26)
        chunks = [(row, row, at) for row, at in zip(torch.split(x, 1, 1), (1, 4, 8), strict=True)]
        put_chunks(native, chunks, (cos, sin), k, v)
        _agree("K of chunks", k, out)
        _agree("V of chunks", v[:, [1, 4, 8]], wide)
        if dtype is torch.float32:
            continue
        weight, row = draw(5, 77, dtype=dtype), draw(1, 77)
        _agree("gemv", native.gemv(weight, row), row @ weight.float().t())
        weight, rows, bias = draw(37, 300, dtype=dtype) / 8, draw(15, 300), draw(37)
        _agree("gemm", Panels(native, weight, bias)(rows), rows @ weight.float().t() + bias)

    text = bytes(range(256)) * 20
    for length in (241, 1024, 4096, 5000):
        found = native.library.xxh3_64(text, length)
        if found != xxhash.xxh3_64_intdigest(text[:length]):
            raise KernelsUnavailableError(f"the compiled XXH3 of {length} bytes is {found:#x}")

    weight, row = draw(5, 2 * INT8_GROUP), draw(1, 2 * INT8_GROUP)
    int8 = Int8Weights.of(weight)
    wide = int8.values * int8.scales.repeat_interleave(INT8_GROUP, 1)
    _agree("gemv of int8", native.gemv(int8, row), row @ wide.t())

    x, weight = draw(3, 77), draw(77)
    _agree("rms_norm", native.rms_norm(x, weight, 1e-5), F.rms_norm(x, (77,), weight, 1e-5))
    x = 4 * draw(3, 42)
    gate, up = x.chunk(2, -1)
    _agree("silu", native.gated(x, "silu"), F.silu(gate) * up)
    _agree("gelu", native.gated(x, "gelu_tanh"), F.gelu(gate, approximate="tanh") * up)

    q, k, v = draw(6, 1, 13), draw(2, 300, 13), draw(2, 300, 13)
    weights = (q.view(2, 3, 13) @ k.transpose(1, 2) * 13**-0.5).softmax(-1)
    _agree("decode", native.decode_attention(q, [k], [v], [300]), (weights @ v).view(1, -1))

    _check_unpack(NativeUnpack(native), draw)
    _check_layers(native, draw)


def _check_unpack(native: NativeUnpack, draw: Callable[..., Tensor]) -> None:
    """Codes of 4 bits, of which one channel has 8: 3 tokens of 2 parts of 24 numbers."""
    scales, steps = draw(2, 48, dtype=torch.bfloat16), draw(3, 2, dtype=torch.bfloat16)
    codes = (draw(3, 48).abs() * 8).clamp(max=15).to(torch.uint8)
    rows, low_bits = codes[:, :24] | codes[:, 24:] << 4, codes[:, :1]
    mask = torch.tensor([0, 0, 0, 1 << 6, 0, 0], dtype=torch.uint8)
    parts = (scales, steps, mask, torch.cat((rows, low_bits), 1), rows)
    layer = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])
    k, v = torch.empty(1, 3, 48), torch.empty(1, 3, 48)
    native(layer, k, v, bits=4, groups=1, parts=2)
    numbers = codes.float()
    numbers[:, 30] = 16 * numbers[:, 30] + codes[:, 0]
    _agree("unpacking of K", k[0], scales[0].float() + scales[1].float() * numbers)
    # Sylvester's matrix of 8, the widest power of two that divides 24.
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(8)] for i in range(8)])
    spread = ((codes.float() - 7.5).view(3, 2, 24) * steps.float()[..., None]).view(3, 6, 8)
    _agree("unpacking of V", v[0], (spread @ signs / 8).view(3, 48))


def _check_layers(native: Native, draw: Callable[..., Tensor]) -> None:
    """The first position of two layers: attention is the value of the row's own KV head."""
    shape = LayersShape(
        hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=64, activation="silu",
        norm_eps=1e-5, attention_scale=1.0, residual_scale=0.5,
    )  # fmt: skip
    parts, x = [], draw(1, 64)
    expected = x.clone()
    for _ in range(2):
        outputs = {"q": 64, "k": 32, "v": 32, "output": 64, "gate": 64, "up": 64, "down": 64}
        dense = {name: draw(count, 64) / 8 for name, count in outputs.items()}
        biases, norms = {"v": draw(32)}, {"before_attention": draw(64), "after_mlp": draw(64)}
        parts.append(
            LayerParts(
                {name: Product(w, biases.get(name)) for name, w in dense.items()}, norms, rope=0
            )
        )
        row = F.rms_norm(expected, (64,), norms["before_attention"], 1e-5)
        v = F.linear(row, dense["v"], biases["v"]).view(1, 2, 1, 16)
        mixed = v.expand(1, 2, 2, 16).reshape(1, 64)
        expected = expected + 0.5 * F.linear(mixed, dense["output"])
        gated = F.silu(F.linear(expected, dense["gate"])) * F.linear(expected, dense["up"])
        part = F.linear(gated, dense["down"])
        expected = expected + 0.5 * F.rms_norm(part, (64,), norms["after_mlp"], 1e-5)
    tables = draw(3, 16)
    out = NativeLayers(native, shape, parts)(x, draw(2, 2, 2, 3, 16), 0, [(tables, tables)])
    _agree("layers", out, expected)


def _agree(what: str, got: Tensor, expected: Tensor) -> None:
    if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
        raise KernelsUnavailableError(
            f"the compiled {what} is off by {(got - expected).abs().max():g} on this machine"
        )
