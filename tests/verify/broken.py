"""Ways in which fusion goes wrong elsewhere, brought in through the contract of strategies alone.

K placed at position p after it was turned by s more is K at p + s: so wrong places, missing and
double rotation are all made by turning what the layer stream yields.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvrag.fusion import ChunkSpan, Prompt, create, strategy_names
from kvrag.kernels.reference import attention
from kvrag.models.layer import Layer
from kvrag.models.rope import inverse_frequencies

#: Steps by which each token's K is turned too far: (prompt, chunk, positions) → steps.
Steps = Callable[[Prompt, ChunkSpan, Tensor], Tensor]

ROPE_BREAKS: dict[str, Steps] = {
    "one place late": lambda prompt, span, at: torch.ones_like(at),
    "not rotated": lambda prompt, span, at: -at,
    "rotated twice": lambda prompt, span, at: at,
    "where it was computed": lambda prompt, span, at: torch.full_like(
        at, len(prompt.prefix_ids) - span.start
    ),
}


def break_rope(monkeypatch, steps: Steps, layers: set[int] | None = None) -> None:
    """All stored K, or that of some layers, is placed wrongly by every strategy."""
    for kind in {type(create(name)) for name in strategy_names()}:
        if not kind.uses_blocks:
            continue

        def start(self, decoder, prompt, stream, cache, started=kind.start):
            first = self.first_chunks(decoder, prompt)
            return started(
                self, decoder, prompt, _Turned(stream, decoder, prompt, first, steps, layers), cache
            )

        monkeypatch.setattr(kind, "start", start)


class _Turned:
    """A layer stream whose K is turned too far."""

    def __init__(self, stream, decoder, prompt, first_chunks, steps, layers) -> None:
        self._stream, self._configs, self._prompt = stream, decoder.config.layers, prompt
        self._first_chunks, self._steps, self._layers = first_chunks, steps, layers
        self._next = 0

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def place_layer(self, place):
        """What is placed where it lies would not be turned."""
        return self.next_layer()

    def next_layer(self):
        index, self._next = self._next, self._next + 1
        layer = list(self._stream.next_layer())
        rope = self._configs[index].rope
        if rope is None or (self._layers is not None and index not in self._layers):
            return layer
        spans = self._prompt.chunks[self._first_chunks[index] :]
        return [
            (
                turned_too_far(
                    k, rope, self._steps(self._prompt, span, torch.arange(span.start, span.end))
                ),
                v,
            )
            for span, (k, v) in zip(spans, layer, strict=True)
        ]


def turned_too_far(k: Tensor, rope, steps: Tensor) -> Tensor:
    """K (kv_heads, n, head_dim), each row turned by its number of positions."""
    half = rope.rotary_dim // 2
    angles = torch.outer(steps.double(), inverse_frequencies(rope).double())
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = k.double().split([half, half, k.shape[-1] - 2 * half], dim=-1)
    parts = (first * cos - second * sin, first * sin + second * cos, rest)
    return torch.cat(parts, dim=-1).to(k.dtype)


def break_mask(monkeypatch) -> None:
    """Rows are masked as if they were the last ones: scattered rows see the future."""

    def attend(self, q, k, v, positions):
        counted = torch.arange(k.shape[1] - len(positions), k.shape[1])
        scale = self._config.attention_scale
        return attention(self.rotate(q, positions), k, v, counted, scale=scale, window=self.window)

    monkeypatch.setattr(Layer, "attend", attend)
