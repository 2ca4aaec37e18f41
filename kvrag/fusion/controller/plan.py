"""What a run will compute and what must have been loaded by then, layer by layer.

From the shape of the model, the prompt and what the strategy expects of itself; no speeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvrag.fusion.base import FusionStrategy
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.stream import Amounts, add_amounts
from kvrag.fusion.stream.block_stream import LARGEST_GROUP
from kvrag.models.config import ModelConfig
from kvrag.models.decoder import Decoder

__all__ = ["ChunkSource", "Needed", "Plan", "Stage", "Work", "alone", "make_plan"]


class Work(NamedTuple):
    """Amounts of work, as `Fit` takes them.

    visits: layers that rows go through together, whose weights are read once. flops: all floating
    point operations of rows, attention's included. attention_flops: attention's alone. placed:
    stored tokens rotated and written into the cache, summed over the layers.
    """

    visits: float
    flops: float
    attention_flops: float
    placed: float

    def plus(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


class ChunkSource(NamedTuple):
    """Where a chunk's block lies, and the bytes of each of its layers there.

    layer_nbytes: empty where nothing must be loaded. cached_share: see `Tier.cached_share`.
    """

    tier: str
    layer_nbytes: tuple[int, ...]
    cached_share: float | None = None


class Needed(NamedTuple):
    """What one tier must have delivered. first: layer 0, for which all others wait; rest: those."""

    first: Amounts = Amounts()
    rest: Amounts = Amounts()


class Stage(NamedTuple):
    """One layer of a run. needed: what each tier must have delivered before, from its first.

    It is empty where nothing new is needed.
    """

    work: Work
    needed: dict[str, Needed]


@dataclass(frozen=True, slots=True)
class Plan:
    """A run. first: of the chunks that no tier has, which are computed before it."""

    first: Work
    stages: tuple[Stage, ...]

    @property
    def work(self) -> Work:
        """Of all stages."""
        total = Work(0, 0, 0, 0)
        for stage in self.stages:
            total = total.plus(stage.work)
        return total

    @property
    def needed(self) -> dict[str, Needed]:
        """What each tier delivers in all, none where it delivers nothing."""
        total: dict[str, Needed] = {}
        for stage in self.stages:
            total.update(stage.needed)
        return total

    @property
    def tiers(self) -> frozenset[str]:
        """All from which something is loaded."""
        return frozenset(self.needed)


def make_plan(
    strategy: FusionStrategy,
    decoder: Decoder,
    prompt: Prompt,
    sources: Sequence[ChunkSource | None],
    behind: Sequence[int] | None = None,
) -> Plan | None:
    """The run of a strategy over `prompt`; None if the strategy cannot tell what it computes.

    Args:
        sources: one a chunk, None for one that must be computed; not looked at where the strategy
            uses no blocks.
        behind: one a chunk, the tokens before it where it must be computed; by default those of the
            prompt's prefix.
    """
    visits = strategy.expected_visits(decoder, prompt)
    if visits is None:
        return None
    config, pulled = decoder.config, 0
    stages: list[Stage] = []
    needed: list[dict[str, Needed]] = [{}] * config.num_layers
    placed = [0] * config.num_layers
    first = Work(0, 0, 0, 0)
    if strategy.uses_blocks:
        first_chunks = strategy.first_chunks(decoder, prompt)
        needed = _needed(sources, first_chunks)
        placed = [sum(len(s.token_ids) for s in prompt.chunks[i:]) for i in first_chunks]
        behind = behind or [len(prompt.prefix_ids)] * len(prompt.chunks)
        for span, source, prefix in zip(prompt.chunks, sources, behind, strict=True):
            if source is None:
                first = first.plus(alone(config, prefix, len(span.token_ids)))
    question = len(prompt.question_ids)
    mean_context = (len(prompt.prefix_ids) + prompt.question_start + 1) / 2
    mean_question = prompt.question_start + (question + 1) / 2
    for layer, context_rows in visits:
        work = _rows(config, layer, context_rows, mean_context).plus(
            _rows(config, layer, question, mean_question)
        )
        new = layer >= pulled
        if new:
            work, pulled = work._replace(placed=placed[layer]), layer + 1
        stages.append(Stage(work._replace(visits=1), needed[layer] if new else {}))
    return Plan(first, tuple(stages))


def alone(config: ModelConfig, prefix: int, tokens: int) -> Work:
    """A chunk of `tokens` computed alone behind `prefix` tokens."""
    total = Work(config.num_layers, 0, 0, 0)
    for layer in range(config.num_layers):
        total = total.plus(_rows(config, layer, tokens, prefix + (tokens + 1) / 2))
    return total


def _rows(config: ModelConfig, layer: int, rows: float, mean_keys: float) -> Work:
    """Rows in one layer that see so many keys in the mean, where there is no window."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.hidden_size * (2 * q + 2 * kv + 3 * config.mlp_size)
    keys = min(mean_keys, config.windows[layer] or mean_keys)
    attention = rows * 4 * q * keys
    return Work(0, rows * 2 * weights + attention, attention, 0)


def _needed(
    sources: Sequence[ChunkSource | None], first_chunks: Sequence[int]
) -> list[dict[str, Needed]]:
    """For each layer what each tier has delivered when that layer is there.

    Layers come in groups that grow, so that a layer is there when the last of its group is.
    """
    num_layers, end, size = len(first_chunks), 0, 1
    sums: dict[str, tuple[list[float], list[float]]] = {}
    needed: list[dict[str, Needed]] = []
    while end < num_layers:
        first, end = end, min(num_layers, end + size)
        for layer in range(first, end):
            # Numbers are summed as such: a tuple for each of many chunks takes milliseconds.
            for source in sources[first_chunks[layer] :]:
                if source is not None and source.layer_nbytes:
                    parts = sums.setdefault(source.tier, ([0.0] * 3, [0.0] * 3))
                    add_amounts(
                        parts[layer > 0],
                        source.layer_nbytes[layer],
                        source.cached_share,
                        begins=layer == 0,
                    )
        total = {tier: Needed(*(Amounts(*part) for part in parts)) for tier, parts in sums.items()}
        needed += [total] * (end - first)
        size = min(end + 1, LARGEST_GROUP)
    return needed
