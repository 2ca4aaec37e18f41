"""What the corpus of an open engine is made of, for whoever checks, exports or imports one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvrag.blocks import ChunkBlocks, PlacedBlocks
from kvrag.config import Settings
from kvrag.corpus import Corpus
from kvrag.home import Home
from kvrag.models.source import Model
from kvrag.references import References
from kvrag.retrieval.catalog import Catalog
from kvrag.store.codecs import Codec
from kvrag.store.tiered import TieredStore

__all__ = ["CorpusParts"]


@dataclass(frozen=True, slots=True)
class CorpusParts:
    """Of the engine's namespace, but for what a home has once: catalog, references, store.

    `blocks_in(namespace, codec, prefix_ids)`: blocks of this model in any namespace.
    """

    settings: Settings
    home: Home
    model: Model
    catalog: Catalog
    references: References
    store: TieredStore
    corpus: Corpus
    blocks: PlacedBlocks
    blocks_in: Callable[[str, Codec, Sequence[int]], ChunkBlocks]
