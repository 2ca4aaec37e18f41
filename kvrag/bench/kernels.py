"""How near each kernel is to what the machine can do at all, in the shapes of the opened model.

Attention is held against matrix products alone: the rate of the two products of one block of rows,
times the products that the mask leaves. Everything else moves memory, and is held against a plain
copy: its bytes, each read or written once, at the rate of that copy, which small tensors exceed in
a CPU's caches. Implementations and bounds take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvrag.bench.frame import median, show
from kvrag.engine import Engine
from kvrag.kernels import Kernels, KernelsUnavailableError, choose
from kvrag.models.decoder import Decoder

__all__ = ["KernelOptions", "run"]

#: Rows of the products that bound attention.
_BLOCK_ROWS = 64
_QUESTION_ROWS = 32
#: A sample is of as many calls as take this long.
_SAMPLE_S = 0.005
_COPY_NBYTES = 64 * 2**20
#: The reference holds the scores of all heads at once.
_MOST_DENSE_NBYTES = 2**30


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """Tokens of the context, tokens a chunk, the share of scattered rows, and repetitions."""

    tokens: int = 4096
    chunk_tokens: int = 256
    ratio: float = 0.15
    repetitions: int = 5


@dataclass(frozen=True, slots=True)
class _Case:
    """One kernel on one shape.

    work: floating-point operations if `flops`, else bytes. bound: does `bound_work` of the same
    kind as fast as the machine can. dense: whether the reference can run it.
    """

    kernel: str
    shape: str
    call: Callable[[Kernels], object]
    work: float
    bound: Callable[[], object]
    bound_work: float
    flops: bool
    dense: bool = True


@torch.inference_mode()
def run(engine: Engine, options: KernelOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON)."""
    decoder = engine.model.decoder
    implementations = _implementations(engine)
    cases = [
        _measured(case, implementations, decoder.device, options.repetitions)
        for case in _cases(decoder, options)
    ]
    result = {
        "benchmark": "kernels",
        "tokens": options.tokens,
        "cases": cases,
        "dtype": engine.settings.dtype,
        "compute_dtype": str(decoder.compute_dtype).removeprefix("torch."),
        "device": str(decoder.device),
        "model": engine.settings.model,
    }
    columns = ("kernel", "shape", "bound", *(f"{name} ms (of bound)" for name in implementations))
    rows = [
        (
            case["kernel"],
            case["shape"],
            f"{case['bound_rate']:g} {case['bound_unit']}",
            *(
                f"{case['ms'][name]:g} ({case['of_bound'][name]:.0%})" if name in case["ms"] else ""
                for name in implementations
            ),
        )
        for case in cases
    ]
    show(f"kernels in {result['compute_dtype']} on {result['device']}", columns, rows, result)
    return result


def _implementations(engine: Engine) -> dict[str, Kernels]:
    decoder = engine.model.decoder
    place = decoder.device, decoder.compute_dtype
    found = {"torch": choose("torch", *place), "cpu": choose("cpu", *place)}
    native = choose("cpu", *place, native_folder=engine.settings.kernels_dir)
    found[native.name] = native
    if decoder.device.type == "cuda":
        try:
            found["triton"] = choose("triton", *place)
        except KernelsUnavailableError as exc:
            print(f"triton is not measured: {exc}")
    return found


def _measured(
    case: _Case, implementations: dict[str, Kernels], device: torch.device, repetitions: int
) -> dict[str, Any]:
    calls: dict[str, Callable[[], object]] = {"bound": case.bound}
    for name, kernels in implementations.items():
        if case.dense or name != "torch":
            calls[name] = partial(case.call, kernels)
    times = {}
    for name, call in calls.items():
        _seconds(call, 1, device)  # buffers, and code compiled at first use
        times[name] = math.ceil(_SAMPLE_S / _seconds(call, 1, device))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, times[name], device))
    rate = case.bound_work / median(seconds.pop("bound"))
    ms = {name: median(taken) * 1e3 for name, taken in seconds.items()}
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "bound_rate": median([rate / 1e9]),
        "bound_unit": "GFLOP/s" if case.flops else "GB/s",
        "ms": {name: median([taken]) for name, taken in ms.items()},
        "of_bound": {name: median([case.work / rate * 1e3 / taken]) for name, taken in ms.items()},
    }


def _seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    """The mean of some calls, one after another."""
    begun = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / times


def _cases(decoder: Decoder, options: KernelOptions) -> Iterator[_Case]:
    tokens = options.tokens
    yield from _attention(decoder, "attention, full prefill", torch.arange(tokens // 4))
    yield from _attention(decoder, "attention, full prefill", torch.arange(tokens))
    scattered = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))
    rows = torch.cat((scattered[: round(options.ratio * tokens)], torch.tensor([tokens - 1])))
    yield from _attention(decoder, "attention, scattered", rows.sort().values)
    question = torch.arange(tokens - min(_QUESTION_ROWS, tokens), tokens)
    yield from _attention(decoder, "attention, question", question)
    yield from _attention(decoder, "attention received, question", question, received=True)
    yield from _memory(decoder, options)


def _attention(
    decoder: Decoder, name: str, positions: Tensor, *, received: bool = False
) -> Iterator[_Case]:
    """Once a window that the model has."""
    config, rows = decoder.config, len(positions)
    if rows == 0:
        return
    keys, dim = int(positions[-1]) + 1, config.head_dim
    draw = _drawing(decoder)
    q, k, v = (draw(h, n, dim) for h, n in _shapes(decoder, rows, keys))
    block = min(rows, _BLOCK_ROWS) * config.num_heads // config.num_kv_heads
    left, weights = draw(block, dim), draw(block, keys)
    at = positions.to(decoder.device)
    for window in dict.fromkeys(config.windows):
        seen = (positions + 1).clamp(max=window or keys).sum().item()

        def call(kernels: Kernels, window: int | None = window) -> object:
            attend = kernels.attention_received if received else kernels.attention
            return attend(q, k, v, at, window=window)

        yield _Case(
            kernel=name,
            shape=f"{rows} x {keys}" + ("" if window is None else f", window {window}"),
            call=call,
            work=4 * config.num_heads * dim * seen,
            bound=lambda: (left @ k[0].t(), weights @ v[0]),
            bound_work=4 * block * keys * dim,
            flops=True,
            dense=config.num_heads * rows * keys * q.element_size() <= _MOST_DENSE_NBYTES,
        )


def _memory(decoder: Decoder, options: KernelOptions) -> Iterator[_Case]:
    config, tokens = decoder.config, options.tokens
    dim, stored = config.head_dim, decoder.dtype
    draw = _drawing(decoder)
    numbers = config.num_kv_heads * tokens * dim
    wide = decoder.compute_dtype.itemsize
    source = torch.ones(_COPY_NBYTES, dtype=torch.uint8, device=decoder.device)
    target = torch.empty_like(source)

    def case(kernel: str, shape: str, nbytes: float, call: Callable[[Kernels], object]) -> _Case:
        return _Case(
            kernel,
            shape,
            call,
            work=nbytes,
            bound=lambda: target.copy_(source),
            bound_work=2 * _COPY_NBYTES,
            flops=False,
        )

    (_, one), (kv_heads, _) = _shapes(decoder, 1, tokens)[:2]
    q = draw(config.num_heads, one, dim)
    k, v = draw(kv_heads, tokens, dim), draw(kv_heads, tokens, dim)
    yield case(
        "decode attention",
        f"1 x {tokens}",
        2 * numbers * wide,
        lambda kernels: kernels.decode_attention(q, [k], [v], [tokens]),
    )
    size = min(options.chunk_tokens, tokens)
    spans = [slice(start, start + size) for start in range(0, tokens - size + 1, size)]
    chunks = [draw(kv_heads, size, dim).to(stored) for _ in spans]
    cos, sin = draw(tokens, dim), draw(tokens, dim)

    def place(kernels: Kernels, tables: Sequence[Tensor | None]) -> None:
        for chunk, span in zip(chunks, spans, strict=True):
            kernels.rotate_into(chunk, tables[0], tables[1], k, span)

    moved = numbers * (wide + stored.itemsize)
    shape = f"{len(spans)} x {size}"
    yield case("rotate into the cache", shape, moved, lambda kernels: place(kernels, (cos, sin)))
    yield case("copy into the cache", shape, moved, lambda kernels: place(kernels, (None, None)))
    yield case(
        "deviation", f"{tokens}", 2 * numbers * wide, lambda kernels: kernels.deviation(k, v)
    )
    weight = torch.ones(config.hidden_size, device=decoder.device)
    weight = weight.to(torch.float64 if decoder.compute_dtype is torch.float64 else torch.float32)
    for rows in (1, 512):
        x, gate_up = draw(rows, config.hidden_size), draw(rows, 2 * config.mlp_size)
        yield case(
            "rms norm",
            f"{rows} x {config.hidden_size}",
            2 * x.numel() * wide,
            partial(_norm, x=x, weight=weight),
        )
        yield case(
            "gated activation",
            f"{rows} x {config.mlp_size}",
            1.5 * gate_up.numel() * wide,
            partial(_gate, gate_up=gate_up),
        )


def _norm(kernels: Kernels, x: Tensor, weight: Tensor) -> Tensor:
    return kernels.rms_norm(x, weight, 1e-5)


def _gate(kernels: Kernels, gate_up: Tensor) -> Tensor:
    return kernels.gated(gate_up, "silu")


def _shapes(decoder: Decoder, rows: int, keys: int) -> tuple[tuple[int, int], ...]:
    """Heads and length of Q, K and V."""
    heads, kv_heads = decoder.config.num_heads, decoder.config.num_kv_heads
    return (heads, rows), (kv_heads, keys), (kv_heads, keys)


def _drawing(decoder: Decoder) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator)
        return numbers.to(decoder.device, decoder.compute_dtype)

    return draw
