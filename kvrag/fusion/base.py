"""The contract of fusion: a strategy turns a prompt and its blocks into a KV cache and logits.

A strategy is one file, registered by name. The engine asks it to `start` and drives the run; it
never asks which strategy it has. A run does one bounded piece of work a step, about one layer, so
that a scheduler can put decode iterations in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from kvrag.errors import InputError, UnknownStrategyError
from kvrag.fusion.prompt import Prompt
from kvrag.generation.kv_cache import KVCache
from kvrag.models.decoder import Decoder

__all__ = [
    "Fused",
    "FusionReport",
    "FusionRun",
    "FusionStrategy",
    "LayerStream",
    "create",
    "fuse",
    "register",
    "strategy_names",
]


class LayerStream(Protocol):
    """Stored K and V of a prompt's chunks, layer by layer, in order, each layer once."""

    def next_layer(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Un-rotated K and V (kv_heads, tokens, head_dim) of the chunks; read-only.

        Of each layer only the chunks from `FusionStrategy.first_chunks` on. Waits until the layer
        is loaded and verified.
        """
        ...

    def close(self) -> None:
        """Stop loading and release the blocks. A second call does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What a run computed.

    selected: positions int64, ascending, of the context tokens in the first filtered layer.
    context_rows: rows computed for context tokens, summed over the layers.
    """

    selected: Tensor
    context_rows: int


@dataclass(frozen=True, slots=True)
class Fused:
    """logits: float32 (1, vocab) of the prompt's last token."""

    logits: Tensor
    report: FusionReport


class FusionRun(ABC):
    """One prompt on its way through the layers. The cache holds the prompt when it is done."""

    @abstractmethod
    def step(self) -> Fused | None:
        """Do about one layer of work; the result when it was the last."""

    @abstractmethod
    def cancel(self) -> None:
        """Give up and release everything. A second call, or one after the end, does nothing."""


@dataclass(frozen=True, slots=True)
class FusionStrategy(ABC):
    """How stored KV becomes a prompt's KV.

    Args:
        ratio: share of the selectable tokens to recompute, averaged over the layers, for
            strategies that select.

    Raises:
        InputError: the ratio is outside 0 … 1.
    """

    ratio: float = 0.15

    name: ClassVar[str]
    #: Whether the strategy reads stored blocks at all.
    uses_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not number or not 0.0 <= self.ratio <= 1.0:
            raise InputError(f"ratio is {self.ratio!r}; it must lie between 0 and 1")

    def first_chunks(self, decoder: Decoder, prompt: Prompt) -> list[int]:
        """For each layer the index of the first chunk whose stored KV the run will ask for.

        Where a strategy says so, chunks before it, which lie outside the layer's window for every
        row that may be computed, are not loaded there.
        """
        return [0] * len(decoder.layers)

    @abstractmethod
    def start(
        self, decoder: Decoder, prompt: Prompt, layers: LayerStream, cache: KVCache
    ) -> FusionRun:
        """Begin a run.

        Args:
            layers: the chunks' stored KV; may be exhausted or not, the run closes it at its end.
            cache: holds the exact KV of the prompt's prefix and nothing else.
        """


_STRATEGIES: dict[str, type[FusionStrategy]] = {}


def register(strategy: type[FusionStrategy]) -> type[FusionStrategy]:
    """Class decorator: make a strategy known under its `name`."""
    _STRATEGIES[strategy.name] = strategy
    return strategy


def strategy_names() -> list[str]:
    """Registered names, sorted."""
    return sorted(_STRATEGIES)


def create(name: str, ratio: float | None = None) -> FusionStrategy:
    """A strategy by name, with its default ratio if none is given.

    Raises:
        UnknownStrategyError: names the known ones.
        InputError: see `FusionStrategy`.
    """
    if not isinstance(name, str) or name not in _STRATEGIES:
        raise UnknownStrategyError(
            f"unknown fusion strategy {name!r}; known are {', '.join(strategy_names())}"
        )
    return _STRATEGIES[name]() if ratio is None else _STRATEGIES[name](ratio=ratio)


@torch.inference_mode()
def fuse(run: FusionRun, cancelled: Callable[[], bool] = lambda: False) -> Fused | None:
    """Drive a run to its end; None if `cancelled` turned true before. Frees the run on errors."""
    try:
        while not cancelled():
            if (fused := run.step()) is not None:
                return fused
    except BaseException:
        run.cancel()
        raise
    run.cancel()
    return None
