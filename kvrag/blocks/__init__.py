"""Stored KV of chunks: its keys, what it is computed behind, and which a prompt wants."""

from kvrag.blocks.calibration import fine_channels
from kvrag.blocks.chunk_blocks import MOST_WAIT_S, ChunkBlocks, open_chunks
from kvrag.blocks.context import DEFAULT_CONTEXT, context_ids
from kvrag.blocks.placed import PlacedBlocks
from kvrag.blocks.single_flight import SingleFlight

__all__ = [
    "DEFAULT_CONTEXT",
    "MOST_WAIT_S",
    "ChunkBlocks",
    "PlacedBlocks",
    "SingleFlight",
    "context_ids",
    "fine_channels",
    "open_chunks",
]
