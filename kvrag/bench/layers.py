"""Which layers need repair: how stale their stored KV is, and what mending them would bring.

For every item full prefill gives the true K and V of the context. Per layer, the deviation is the
squared distance of the stored from the true values, relative to the true ones, over the chunks
behind the first (which is exact). Then the question is asked of a cache whose KV is the true one
in some layers and the stored one in the others: a bound on what repairing those layers can bring,
at no error of selection. A window layer sees only the context's end, so its KV can be as stale as
any and yet hardly matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from kvrag.bench.fidelity import FidelityOptions
from kvrag.bench.frame import show
from kvrag.bench.intervals import interval, shown
from kvrag.bench.items import Item, drawn, load_items
from kvrag.engine import Engine
from kvrag.fusion.prompt import ChunkSpan, Prompt
from kvrag.generation.kv_cache import KVCache
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.models.decoder import Decoder
from kvrag.models.forward import append, extend
from kvrag.prefill import Prefilled
from kvrag.verify.divergence import divergence, greedy_answer

__all__ = ["run"]


@dataclass(frozen=True, slots=True)
class _Item:
    """One item under full prefill, with its greedy answer, and what a store would hold of it.

    stored: for each layer rotated K and V (kv_heads, context tokens, head_dim).
    """

    full: Prefilled
    stored: list[tuple[Tensor, Tensor]]
    greedy: list[int]
    logprobs: Tensor


def run(engine: Engine, path: Path, options: FidelityOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON)."""
    lines = drawn(load_items(path, options.half), options.items, options.seed)
    layers = engine.model.decoder.layers
    mended = _sets(engine)
    scores: dict[str, list[float]] = {name: [] for name in mended}
    stale: list[list[tuple[float, float]]] = []
    for line in track(lines, description=path.stem, transient=True):
        item = _item(engine, line, options.new_tokens)
        stale.append([_staleness(item, layer.index) for layer in layers])
        for name, chosen in mended.items():
            scores[name].append(_divergence(engine, item, chosen))
    groups = [line.group for line in lines]
    kl = {name: interval(values, groups) for name, values in scores.items()}
    # (layers, K and V)
    deviation = np.mean(stale, axis=0)
    windows = list(engine.model.decoder.config.windows)
    result = {
        "benchmark": "layers",
        "data": path.stem,
        "items": len(lines),
        "half": options.half,
        "windows": windows,
        "deviation_k": [float(k) for k, _ in deviation],
        "deviation_v": [float(v) for _, v in deviation],
        "kl": kl,
        "dtype": engine.settings.dtype,
        "model": engine.settings.model,
    }
    rows = [
        (name, len(chosen), *_mean_deviation(deviation, chosen), shown(kl[name]))
        for name, chosen in mended.items()
    ]
    columns = ("true KV in", "layers", "K stale by", "V stale by", "KL to full prefill")
    show(f"{path.stem}: {len(lines)} items", columns, rows, result)
    return result


def _mean_deviation(deviation: Any, layers: frozenset[int]) -> tuple[str, str]:
    if not layers:
        return "", ""
    k, v = deviation[sorted(layers)].mean(axis=0)
    return f"{k:.3f}", f"{v:.3f}"


def _sets(engine: Engine) -> dict[str, frozenset[int]]:
    """Named sets of layers to mend: by kind, by third, and each alone."""
    windows = engine.model.decoder.config.windows
    count = len(windows)
    everywhere = frozenset(range(count))
    windowed = frozenset(index for index, window in enumerate(windows) if window is not None)
    sets = {"no layer (reuse)": frozenset[int](), "all layers": everywhere}
    if 0 < len(windowed) < count:
        sets |= {"global layers": everywhere - windowed, "window layers": windowed}
    thirds = [frozenset(range(count * i // 3, count * (i + 1) // 3)) for i in range(3)]
    sets |= dict(zip(("first third", "second third", "last third"), thirds, strict=True))
    return sets | {
        f"layer {i}{' (window)' if i in windowed else ''}": frozenset((i,)) for i in range(count)
    }


def _item(engine: Engine, line: Item, new_tokens: int) -> _Item:
    full = engine.prefill(
        line.question, passages=line.passages, strategy="full", new_tokens=new_tokens
    )
    greedy = greedy_answer(engine.model, full, new_tokens)
    return _Item(
        full, _stored(engine, full.prompt), greedy, engine.continuation_logprobs(full, greedy)
    )


def _stored(engine: Engine, prompt: Prompt) -> list[tuple[Tensor, Tensor]]:
    """Every chunk computed alone behind what the settings say, K rotated to its place."""
    decoder, blocks = engine.model.decoder, engine.passage_blocks
    prefixes = PrefixCache(decoder)
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in decoder.layers]
    for place, span in enumerate(prompt.chunks):
        prefix_ids = (blocks.later(span.token_ids) if place else blocks.first).prefix_ids
        length = len(prefix_ids) + len(span.token_ids)
        cache = KVCache(decoder.config, length, dtype=decoder.compute_dtype, device=decoder.device)
        prefixes.fill(cache, prefix_ids)
        append(decoder, span.token_ids, cache, sink=_Places(decoder, span, parts))
    return [
        (torch.cat([k for k, _ in layer], dim=1), torch.cat([v for _, v in layer], dim=1))
        for layer in parts
    ]


class _Places:
    """A `KVSink` that rotates a chunk's K to its place and adds K and V to each layer's list."""

    def __init__(
        self, decoder: Decoder, span: ChunkSpan, parts: list[list[tuple[Tensor, Tensor]]]
    ) -> None:
        self._positions = torch.arange(span.start, span.end, device=decoder.device)
        self._layers = iter(zip(decoder.layers, parts, strict=True))

    def __call__(self, k: Tensor, v: Tensor) -> None:
        layer, part = next(self._layers)
        part.append((layer.rotate(k, self._positions), v))


def _staleness(item: _Item, layer: int) -> tuple[float, float]:
    """Relative squared deviation of the stored K and V of the tokens that could need repair."""
    prompt, cache = item.full.prompt, item.full.cache
    begin, end = prompt.repairable.start, prompt.question_start
    if begin == end:
        return 0.0, 0.0
    k, v = (
        float((stored - true).square().sum() / true.square().sum())
        for stored, true in (
            (
                stored[:, begin - len(prompt.prefix_ids) :].double(),
                full[layer][:, begin:end].double(),
            )
            for stored, full in zip(item.stored[layer], (cache.k, cache.v), strict=True)
        )
    )
    return k, v


def _divergence(engine: Engine, item: _Item, mended: frozenset[int]) -> float:
    """Mean KL to full prefill along its greedy answer, with the true KV in the `mended` layers."""
    prompt, decoder = item.full.prompt, engine.model.decoder
    cache = KVCache(
        decoder.config,
        prompt.length + len(item.greedy),
        dtype=decoder.compute_dtype,
        device=decoder.device,
    )
    before, context = len(prompt.prefix_ids), prompt.question_start
    true = item.full.cache
    for layer in range(len(decoder.layers)):
        cache.write(
            layer, slice(0, context), true.k[layer][:, :context], true.v[layer][:, :context]
        )
        if layer not in mended:
            cache.write(layer, slice(before, context), *item.stored[layer])
    cache.length = context
    rows = extend(decoder, [*prompt.question_ids, *item.greedy[:-1]], cache, every=True)
    other = rows[len(prompt.question_ids) - 1 :].log_softmax(dim=-1).float()
    return float(divergence(item.logprobs, other).mean())
