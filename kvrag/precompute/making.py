"""One block made: computed while others are stored, and stored where it lasts.

The same wherever it happens: in the threads of a job, or in a worker on another machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvrag.blocks import ChunkBlocks
from kvrag.errors import KvragError
from kvrag.store.block import Block
from kvrag.store.keys import BlockKey

__all__ = ["Effort", "Maker", "StorageFullError", "Wanted"]


class StorageFullError(KvragError):
    """A corpus block could not be stored durably; what was stored before stays."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block that a chunk lacks."""

    chunk_id: int
    blocks: ChunkBlocks
    token_ids: tuple[int, ...]

    @property
    def key(self) -> BlockKey:
        return self.blocks.key(self.token_ids)


@dataclass(slots=True)
class Effort:
    """What it took: nothing at all where another was faster.

    tokens: computed. nbytes: stored. compute_s: in the model. begun_s, ended_s: when that began
    and when the block was stored, as this process's `time.perf_counter` has it.
    """

    tokens: int = 0
    nbytes: int = 0
    compute_s: float = 0.0
    begun_s: float | None = None
    ended_s: float | None = None


class Maker:
    """Makes blocks, one at a time in the model. Thread-safe."""

    def __init__(self, is_stored: Callable[[BlockKey], bool]) -> None:
        """`is_stored` asks the durable tiers for a key."""
        self._is_stored = is_stored
        self._computing = threading.Lock()

    def make(self, wanted: Wanted) -> Effort:
        """Have the block in a durable tier.

        Raises:
            StorageFullError: no durable tier takes it.
        """
        effort = Effort()

        def compute() -> Block:
            block = self._computed(wanted, effort)
            self._put(wanted, block, effort)
            effort.tokens = len(wanted.token_ids)
            return block

        made = wanted.blocks.make(wanted.token_ids, compute)
        if made is not None and not made.computed and not self._is_stored(wanted.key):
            # Who computed it was a request, whose KV need not become durable.
            self._put(wanted, made.block, effort)
        return effort

    def _computed(self, wanted: Wanted, effort: Effort) -> Block:
        with self._computing:
            effort.begun_s = time.perf_counter()
            block = wanted.blocks.compute(wanted.token_ids)
            effort.compute_s = time.perf_counter() - effort.begun_s
            return block

    def _put(self, wanted: Wanted, block: Block, effort: Effort) -> None:
        outcome = wanted.blocks.put(block, durable_only=True)
        if not outcome.durable:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.refused)
            raise StorageFullError(
                f"the KV of chunk {wanted.chunk_id} could not be stored ({reasons})"
            )
        effort.nbytes += block.nbytes
        effort.ended_s = time.perf_counter()
