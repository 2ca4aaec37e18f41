"""Whether stored K stands at its place: RoPE, layer by layer, for chunks that were moved.

K of layer 0 depends on the token and its position alone, so it must be full prefill's under every
strategy at every ratio. In the other layers K depends on what came before; there the K of a chunk
computed alone is turned to its new place here, by complex numbers in float64, and compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvrag.engine import Engine
from kvrag.fusion import ChunkSpan, Prompt
from kvrag.generation.kv_cache import KVCache
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.models.config import LayerConfig
from kvrag.models.decoder import Decoder
from kvrag.models.describe import layer_ranges
from kvrag.models.forward import append
from kvrag.models.rope import inverse_frequencies
from kvrag.models.rope_config import RopeConfig
from kvrag.verify.bounds import placed
from kvrag.verify.check import Check
from kvrag.verify.distance import relative
from kvrag.verify.prompts import with_chunks

__all__ = ["check_first_layer", "check_placing"]


def check_first_layer(engine: Engine, prompt: Prompt, strategies: list[str]) -> Iterator[Check]:
    """K and V of layer 0 are full prefill's, whatever the strategy recomputes."""
    layer = engine.model.decoder.layers[0]
    seen = slice(layer.first_visible(prompt.question_start), prompt.length)
    full = engine.fill(prompt, strategy="full", new_tokens=1).cache
    for name in strategies:
        cache = engine.fill(prompt, strategy=name, new_tokens=1).cache
        yield Check.of(
            "position",
            name,
            max(
                relative(full.k[0][:, seen], cache.k[0][:, seen]),
                relative(full.v[0][:, seen], cache.v[0][:, seen]),
            ),
            placed(engine.model.decoder),
            "K and V of layer 0, relative distance to full prefill's",
        )


def check_placing(engine: Engine, prompt: Prompt) -> Iterator[Check]:
    """Each kind of layer (RoPE, window) turns stored K to its place; chunks in reversed order."""
    decoder = engine.model.decoder
    moved = with_chunks(prompt, [span.token_ids for span in reversed(prompt.chunks)])
    fused = engine.fill(moved, strategy="reuse", new_tokens=1).cache
    prefixes = PrefixCache(decoder)
    alone = [_alone(decoder, prefixes, prompt.prefix_ids, span) for span in moved.chunks]
    begin = len(prompt.prefix_ids)
    for config, indices in _kinds(decoder.config.layers).items():
        worst = 0.0
        for index in indices:
            first = decoder.layers[index].first_visible(moved.question_start)
            for span, own in zip(moved.chunks, alone, strict=True):
                if span.end <= first:
                    continue  # the layer never sees it, and what stands there is undefined
                expected = turned(own.k[index][:, begin:], config.rope, begin, span.start)
                worst = max(worst, relative(expected, fused.k[index][:, span.start : span.end]))
        rope = "no RoPE" if config.rope is None else f"RoPE {config.rope.kind}"
        window = "" if config.window is None else f", window {config.window}"
        yield Check.of(
            "position",
            f"layer{'s' if len(indices) > 1 else ''} {layer_ranges(indices)}",
            worst,
            placed(decoder),
            f"stored K at its place ({rope}{window}), relative distance",
        )


def turned(k: Tensor, rope: RopeConfig | None, old: int, new: int) -> Tensor:
    """K (kv_heads, n, head_dim) of positions from `old` on, moved to those from `new` on; float64.

    Angles are products in float32, as `Rope` has them. What a variant multiplies K by is in it
    already, and stays.
    """
    k = k.cpu().double()
    if rope is None:
        return k
    half, steps = rope.rotary_dim // 2, torch.arange(k.shape[1])
    frequencies = inverse_frequencies(rope).cpu()
    after, before = (
        torch.outer((steps + start).float(), frequencies).double() for start in (new, old)
    )
    turn = torch.polar(torch.ones_like(after), after - before)
    pairs = torch.complex(k[..., :half], k[..., half : 2 * half]) * turn
    return torch.cat((pairs.real, pairs.imag, k[..., 2 * half :]), dim=-1)


def _alone(
    decoder: Decoder, prefixes: PrefixCache, prefix_ids: tuple[int, ...], span: ChunkSpan
) -> KVCache:
    """The exact KV of a chunk behind the prefix, neither stored nor encoded."""
    cache = KVCache(
        decoder.config,
        len(prefix_ids) + len(span.token_ids),
        dtype=decoder.compute_dtype,
        device=decoder.device,
    )
    prefixes.fill(cache, prefix_ids)
    append(decoder, span.token_ids, cache)
    return cache


def _kinds(layers: tuple[LayerConfig, ...]) -> dict[LayerConfig, list[int]]:
    """Layers by what a layer's place depends on."""
    kinds: dict[LayerConfig, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(layer, []).append(index)
    return kinds
