"""Which stored KV of a chunk a prompt wants: it depends on whether anything stands before it.

A chunk that is computed behind the prompt's prefix alone takes itself for the beginning of the
passages. As a prompt's first chunk it is exact; anywhere else it errs, and in much the same way
in all its tokens. Computed behind the prefix and a few passages that matter to nobody it expects
to stand among passages, and errs less than half as much (measurements: docs/fusion.md). So each
chunk has two blocks: one as a prompt's `first`, one for `later` places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvrag.blocks.chunk_blocks import ChunkBlocks
from kvrag.store.keys import BlockKey

__all__ = ["PlacedBlocks"]


class PlacedBlocks:
    """The blocks of one corpus's chunks, for each place in a prompt. Thread-safe."""

    def __init__(
        self,
        first: ChunkBlocks,
        later: ChunkBlocks,
        locate: Callable[[Sequence[BlockKey]], Sequence[str | None]],
    ) -> None:
        """`first` and `later` may be one. locate: the tier that holds each key, or None."""
        self.first, self._later, self._locate = first, later, locate
        self.codec = first.codec

    @property
    def prefixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that chunks are computed behind, at the first place and at later ones."""
        return self.first.prefix_ids, self._later.prefix_ids

    @property
    def all(self) -> tuple[ChunkBlocks, ...]:
        """For every place, each once."""
        return (self.first,) if self._later is self.first else (self._later, self.first)

    def later(self, token_ids: Sequence[int]) -> ChunkBlocks:
        """Those for a chunk behind others; `first` where the model's context is too short."""
        return self._later if self._later.fits(token_ids) else self.first

    def kinds(self, token_ids: Sequence[int], *, first: bool = True) -> list[ChunkBlocks]:
        """All that a chunk may be asked for, each once; without `first`, for later places alone."""
        later = self.later(token_ids)
        return [later] if later is self.first or not first else [later, self.first]

    def choose(self, chunks: Sequence[Sequence[int]]) -> list[ChunkBlocks]:
        """For each of a prompt's chunks, given by their ids, whose block to load, or to compute.

        A block for the other place is better than none, which would have to be computed. A chunk
        that is alone is not worth less than the truth.
        """
        chosen = [self.later(ids) if place else self.first for place, ids in enumerate(chunks)]
        if len(chunks) < 2 or self._later is self.first:
            return chosen
        missing = self._missing(chosen, chunks, range(len(chunks)))
        others = [
            self.first if place else self.later(token_ids) for place, token_ids in enumerate(chunks)
        ]
        lost = set(self._missing(others, chunks, missing))
        for place in missing:
            if place not in lost:
                chosen[place] = others[place]
        return chosen

    def _missing(
        self, blocks: Sequence[ChunkBlocks], chunks: Sequence[Sequence[int]], places: Sequence[int]
    ) -> list[int]:
        """Those of `places` whose chunk no tier has in these blocks."""
        tiers = self._locate([blocks[place].key(chunks[place]) for place in places])
        return [place for place, tier in zip(places, tiers, strict=True) if tier is None]
