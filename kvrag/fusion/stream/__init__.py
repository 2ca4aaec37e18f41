"""Stored KV on its way into a run: layers read ahead of computing, several chunks at a time."""

from kvrag.fusion.stream.block_stream import BlockStream, LoadingCancelled
from kvrag.fusion.stream.chunk_reads import LayerKV
from kvrag.fusion.stream.io_threads import IoThreads
from kvrag.fusion.stream.read_times import Amounts, TierRead, add_amounts

__all__ = [
    "Amounts",
    "BlockStream",
    "IoThreads",
    "LayerKV",
    "LoadingCancelled",
    "TierRead",
    "add_amounts",
]
