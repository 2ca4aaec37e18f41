"""A model, a store and a prefill around them, without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from kvrag.blocks import ChunkBlocks, PlacedBlocks
from kvrag.fusion.cacheblend import CacheBlend
from kvrag.fusion.controller import Controller
from kvrag.fusion.layerwise import LayerState, LayerwiseStrategy
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.selection import Choice, best
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.models.source import open_model
from kvrag.prefill import Prefill, Prefilled
from kvrag.prompting import PromptLayout
from kvrag.store.codecs import codec as named_codec
from kvrag.store.disk import DiskTier
from kvrag.store.keys import BlockKey, KeyMaker
from kvrag.store.ram import RamTier
from kvrag.store.tier import Tier
from kvrag.store.tiered import TieredStore, TierSlot
from tests.models.tiny_models import token_ids

PREFIX = token_ids(6, seed=1)
OTHER_PREFIX = token_ids(9, seed=2)
CHUNKS = [token_ids(n, seed=10 + n) for n in (23, 17, 30)]
QUESTION = token_ids(8, seed=3)


@dataclass(frozen=True, slots=True)
class Recording(CacheBlend):
    """CacheBlend that notes the positions kept behind each layer."""

    name: ClassVar[str] = "recording"
    kept: dict[int, list[int]] = field(default_factory=dict)

    def judges(self, layer: int, num_layers: int) -> bool:
        return True

    def narrow(self, state: LayerState) -> Choice:
        if CacheBlend.judges(self, state.index, state.num_layers):
            choice = CacheBlend.narrow(self, state)
        else:
            choice = best(torch.zeros(len(state.positions)), len(state.positions))
        self.kept[state.index] = state.positions[choice.rows].tolist()
        return choice


@dataclass(frozen=True, slots=True)
class Fixed(CacheBlend):
    """Keeps given positions behind each layer, whatever the deviations."""

    name: ClassVar[str] = "fixed"
    kept: dict[int, list[int]] = field(default_factory=dict)

    def judges(self, layer: int, num_layers: int) -> bool:
        return True

    def narrow(self, state: LayerState) -> Choice:
        wanted = torch.tensor(self.kept[state.index], dtype=torch.int64)
        chosen = torch.isin(state.positions, wanted)
        return Choice(chosen.nonzero()[:, 0], chosen.double())


class CountingTier(RamTier):
    """Notes each segment that is read, (key, layer), as from a tier that is no memory."""

    durable, in_process = True, False

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[BlockKey, int]] = []

    def segments(self, key: BlockKey, first: int, last: int) -> list[memoryview] | None:
        self.read += [(key, layer) for layer in range(first, last)]
        return super().segments(key, first, last)

    def content(self, key: BlockKey) -> list[bytes]:
        """All segments of a block, without being counted."""
        header = super().header(key)
        return [bytes(part) for part in super().segments(key, 0, len(header.segments))]


class Room:
    """`run` fuses one prompt; the store is `tier`, else in memory or under `root` on disk alone."""

    def __init__(
        self,
        folder: Path,
        *,
        root: Path | None = None,
        dtype: torch.dtype = torch.float64,
        corpus_prefix: Sequence[int] = tuple(PREFIX),
        tier: Tier | None = None,
        kernels_dir: Path | None = None,
        codec: str = "raw",
    ) -> None:
        self.model = open_model(str(folder), folder, dtype=dtype, kernels_dir=kernels_dir)
        tier = tier or (RamTier() if root is None else DiskTier(root))
        self.store = TieredStore([TierSlot(tier, None)])
        self.prefixes = PrefixCache(self.model.decoder)
        self.blocks = ChunkBlocks(
            self.model,
            self.store,
            KeyMaker(bytes(range(32))),
            named_codec(codec),
            self.prefixes,
            namespace="tests",
            prefix_ids=corpus_prefix,
        )
        layout = PromptLayout.of(self.model.tokenizer, "Answer.")
        self.controller = Controller(self.model.decoder)
        placed = PlacedBlocks(self.blocks, self.blocks, self.store.locate)
        self.prefill = Prefill(self.model, layout, placed, self.prefixes, self.controller)

    def add(self, *chunks: Sequence[int]) -> None:
        for chunk in chunks:
            self.blocks.put(self.blocks.compute(chunk))

    def prompt(self, chunks, question=QUESTION, prefix=PREFIX) -> Prompt:
        match = tuple(prefix) == self.blocks.prefix_ids
        return Prompt.build(prefix, chunks, question, prefix_match=match)

    def run(self, chunks, strategy, *, question=QUESTION, prefix=PREFIX, **options) -> Prefilled:
        prompt = self.prompt(chunks, question, prefix)
        return self.prefill.run(self.prefill.placed(prompt), strategy, new_tokens=4, **options)


class Recorded(LayerwiseStrategy):
    """Any strategy, noting the positions that begin and those that go on behind each layer."""

    def __init__(self, inner: LayerwiseStrategy) -> None:
        # The base is frozen.
        for name, value in (("ratio", inner.ratio), ("inner", inner), ("begun", []), ("kept", {})):
            object.__setattr__(self, name, value)

    name: ClassVar[str] = "recorded"

    def candidates(self, prompt: Prompt) -> range:
        return self.inner.candidates(prompt)

    def question_layers(self, decoder, prompt):
        return self.inner.question_layers(decoder, prompt)

    def begin(self, prompt, candidates, attention):
        choice = self.inner.begin(prompt, candidates, attention)
        rows = range(len(candidates)) if choice is None else choice.rows.tolist()
        self.begun[:] = [candidates[row] for row in rows]
        return choice

    def judges(self, layer: int, num_layers: int) -> bool:
        return self.inner.judges(layer, num_layers)

    def narrow(self, state: LayerState) -> Choice:
        choice = self.inner.narrow(state)
        self.kept[state.index] = state.positions[choice.rows].tolist()
        return choice
