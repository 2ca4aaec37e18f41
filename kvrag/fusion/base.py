"""The contract of fusion: a strategy turns a prompt and its blocks into a KV cache and logits.

A strategy is one file, registered by name. The engine asks it to `start` and drives the run; it
never asks which strategy it has. A run does one bounded piece of work a step, about one layer, so
that a scheduler can put decode iterations in between.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvrag.errors import InputError, UnknownStrategyError
from kvrag.fusion.prompt import Prompt
from kvrag.generation.kv_cache import KVCache
from kvrag.kernels.native import StoredKV
from kvrag.models.decoder import Decoder

__all__ = [
    "Fused",
    "FusionReport",
    "FusionRun",
    "FusionStrategy",
    "LayerStream",
    "LayerVisit",
    "PlacingStream",
    "create",
    "fuse",
    "one_of",
    "register",
    "strategy_names",
    "whole",
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


@runtime_checkable
class PlacingStream(LayerStream, Protocol):
    """A stream that hands out segments as they are stored, to be decoded where they are placed.

    What lies in memory is verified by that, too.
    """

    def place_layer(
        self, place: Callable[[Mapping[int, StoredKV]], list[int]]
    ) -> Sequence[tuple[Tensor, Tensor] | None]:
        """As `next_layer`, with None for the chunks that `place` has written.

        Args:
            place: is given chunks by their numbers in the prompt, perhaps in parts, writes this
                layer of the sound ones where they belong, and returns the others, which then
                come as if they had been found damaged anywhere else.
        """
        ...


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What a run computed.

    selected: positions int64, ascending, of the context tokens in the first filtered layer.
    computed_rows: rows computed for context tokens and in extra passes, summed over the layers.
    scores: float32 (context tokens,), what each was given last; NaN where none was.
    """

    selected: Tensor
    computed_rows: int
    scores: Tensor


@dataclass(frozen=True, slots=True)
class Fused:
    """logits: float32 (1, vocab) of the prompt's last token."""

    logits: Tensor
    report: FusionReport


class LayerVisit(NamedTuple):
    """A layer that a run will go through with the question's rows and so many context rows."""

    layer: int
    context_rows: float


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
    #: Whether more rows, and better answers, come of a higher ratio, which may then be chosen anew
    #: for each request.
    tunable: ClassVar[bool] = False

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

    def expected_visits(self, decoder: Decoder, prompt: Prompt) -> list[LayerVisit] | None:
        """What a run will compute, in order, for forecasts of its time; None if nobody can tell.

        The first visit of a layer is the one that asks for its stored KV.
        """
        return None

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

    Options of a strategy follow its name: `epic:tokens=4`, `cacheblend:deviation=kv`; several are
    separated by commas. A ratio among them gives way to `ratio`.

    Raises:
        UnknownStrategyError: names the known ones.
        InputError: see `FusionStrategy`; or an option is unknown, given twice or of another form.
    """
    kind, colon, given = name.partition(":") if isinstance(name, str) else (name, "", "")
    if not isinstance(kind, str) or kind not in _STRATEGIES:
        raise UnknownStrategyError(
            f"unknown fusion strategy {name!r}; known are {', '.join(strategy_names())}"
        )
    strategy = _STRATEGIES[kind](**_options(_STRATEGIES[kind], given) if colon else {})
    return strategy if ratio is None else replace(strategy, ratio=ratio)


def _options(strategy: type[FusionStrategy], given: str) -> dict[str, Any]:
    """`window=8,ratio=0.1` by the types of the strategy's defaults."""
    defaults: dict[str, Any] = {field.name: field.default for field in fields(strategy)}
    options: dict[str, Any] = {}
    for part in given.split(","):
        option, _, value = part.partition("=")
        if option in options:
            raise InputError(
                f"option {option!r} of strategy {strategy.name!r} is given twice; give it once"
            )
        if option not in defaults:
            raise InputError(
                f"strategy {strategy.name!r} has no option {option!r}; it has "
                f"{', '.join(f'{name} ({default})' for name, default in defaults.items())}, as in "
                f"{strategy.name}:ratio={defaults['ratio']}"
            )
        kind = type(defaults[option])
        try:
            options[option] = kind(value)
        except ValueError as exc:
            raise InputError(
                f"option {option!r} of strategy {strategy.name!r} is {value!r}; it must be like "
                f"{defaults[option]!r}"
            ) from exc
    return options


def whole(name: str, value: object, low: int) -> None:
    """Check an option that must be a whole number. Raises InputError."""
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63
    if not fits:
        raise InputError(f"{name} is {value!r:.40}; it must be a whole number of {low} or more")


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Check an option that must be one of a few words. Raises InputError."""
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


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
