"""Whether a computed row sees its past and nothing else, also where rows are scattered."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvrag.engine import Engine
from kvrag.fusion import Prompt, create
from kvrag.kernels.reference import attention
from kvrag.models.layer import Layer
from kvrag.models.source import Model
from kvrag.verify.bounds import exact_vectors
from kvrag.verify.check import Check
from kvrag.verify.distance import relative

__all__ = ["check_attention", "check_rows", "watched"]

#: Few rows, far apart; and most of them.
_RATIOS = (0.1, 0.7)
_KEYS, _ROWS = 320, 70


def check_attention(engine: Engine) -> Iterator[Check]:
    """The layers' attention of scattered rows against a dense mask, once a window."""
    decoder, config = engine.model.decoder, engine.model.decoder.config
    for window in dict.fromkeys(config.windows):
        layer = decoder.layers[config.windows.index(window)]
        keys = min(config.max_positions, _KEYS + (window or 0))
        decoder.reserve(keys)
        generator = torch.Generator().manual_seed(0)
        scattered = torch.randperm(keys - 1, generator=generator)[:_ROWS].sort().values
        positions = torch.cat((scattered, torch.tensor([keys - 1]))).to(decoder.device)

        def drawn(heads: int, count: int, generator: torch.Generator = generator) -> Tensor:
            random = torch.randn(heads, count, config.head_dim, generator=generator)
            return random.to(decoder.device, decoder.compute_dtype)

        q = drawn(config.num_heads, len(positions))
        k, v = drawn(config.num_kv_heads, keys), drawn(config.num_kv_heads, keys)
        seen: list[float] = []
        _Watched(layer, seen).attend(q, k, v, positions)
        yield Check.of(
            "mask",
            "attention" if window is None else f"attention, window {window}",
            max(seen),
            exact_vectors(decoder),
            "scattered rows against a dense mask, relative distance",
        )


def check_rows(
    engine: Engine, seen: list[float], prompt: Prompt, strategies: list[str]
) -> Iterator[Check]:
    """Every attention of every strategy's run against a dense mask.

    Args:
        engine: one over a `watched` model that writes to `seen`.
    """
    engine.fill(prompt, strategy="reuse", new_tokens=1)  # blocks are there from now on
    for name in strategies:
        seen.clear()
        for ratio in _RATIOS:
            engine.fill(prompt, strategy=create(name, ratio), new_tokens=1)
        if not seen:
            sentence = "it attends in a way that cannot be watched"
            yield Check.without_value("mask", name, sentence, passed=False)
            continue
        yield Check.of(
            "mask",
            name,
            max(seen, key=lambda distance: (math.isnan(distance), distance)),
            exact_vectors(engine.model.decoder),
            f"all {len(seen)} attentions of its runs against a dense mask, relative distance",
        )


def watched(model: Model, seen: list[float]) -> Model:
    """The model, with layers that write the distance of each attention from a dense one."""
    decoder = copy.copy(model.decoder)
    decoder.layers = [_Watched(layer, seen) for layer in decoder.layers]
    return replace(model, decoder=decoder)


class _Watched(Layer):
    """A layer whose attention is computed twice: as ever, and by a dense mask over all keys."""

    def __init__(self, layer: Layer, seen: list[float]) -> None:
        self.__dict__.update(vars(layer))
        self._seen = seen

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        mixed = super().attend(q, k, v, positions)
        self._compare(mixed, q, k, v, positions)
        return mixed

    def attend_received(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        mixed, received = super().attend_received(q, k, v, positions)
        self._compare(mixed, q, k, v, positions)
        return mixed, received

    def _compare(self, mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        expected = attention(
            self.rotate(q, positions),
            k,
            v,
            positions,
            scale=self._config.attention_scale,
            window=self.window,
        )
        self._seen.append(relative(expected, mixed))
