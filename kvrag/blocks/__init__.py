"""Stored KV of chunks: its keys, what it is computed behind, and which a prompt wants."""

from kvrag.blocks.calibration import fine_channels
from kvrag.blocks.chunk_blocks import ChunkBlocks
from kvrag.blocks.context import DEFAULT_CONTEXT, context_ids
from kvrag.blocks.placed import PlacedBlocks

__all__ = ["DEFAULT_CONTEXT", "ChunkBlocks", "PlacedBlocks", "context_ids", "fine_channels"]
