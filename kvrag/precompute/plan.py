"""What a job would take: chunks counted, bytes from each codec itself, time from a measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from kvrag.blocks import ChunkBlocks, fine_channels
from kvrag.corpus import Corpus
from kvrag.models.source import Model
from kvrag.precompute.manifest import digest
from kvrag.precompute.shard import Shard
from kvrag.retrieval.documents import Document
from kvrag.retrieval.errors import DocumentError
from kvrag.retrieval.loaders import ReadWhole, Skipped
from kvrag.store.codecs import codec, codec_names

__all__ = ["Plan", "plan"]

#: Seconds that are measured at least.
_MEASURED_S = 1.0
#: Segments begin at multiples of this, and so do their sizes.
_ALIGNMENT = 4096
#: Sizes are taken at so many tokens and their multiples; what lies between is rounded up.
_STEP_TOKENS = 16


@dataclass(slots=True)
class Plan:
    """Of the documents that are not in the corpus yet.

    blocks: different ones, of all kinds; a chunk may need several. tokens: of all blocks. nbytes:
    of their KV, by codec, before encryption. seconds: None where there is nothing to compute.
    """

    documents: int = 0
    documents_known: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    chunks: int = 0
    blocks: int = 0
    tokens: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)
    tokens_per_s: float | None = None

    @property
    def seconds(self) -> float | None:
        return self.tokens / self.tokens_per_s if self.tokens_per_s else None


def plan(
    model: Model,
    corpus: Corpus,
    kinds: Callable[[Sequence[int]], Sequence[ChunkBlocks]],
    documents: Iterable[Document | Skipped | ReadWhole],
    shard: Shard,
) -> Plan:
    """Load and cut all documents, and compute a few of their blocks; nothing is stored."""
    result = Plan()
    met: set[str] = set()
    known: set[str] = set()
    sizes: dict[int, int] = {}  # blocks by their tokens, rounded up
    sample: tuple[int, ...] = ()
    for item in documents:
        if isinstance(item, Skipped):
            result.skipped.append(item)
        if not isinstance(item, Document) or not shard.owns(item.id) or item.id in met:
            continue
        met.add(item.id)
        if corpus.holds(item):
            result.documents_known += 1
            continue
        try:
            chunks = corpus.chunked(item).chunks
        except DocumentError as exc:
            result.skipped.append(Skipped(item.source or item.id, str(exc)))
            continue
        result.documents += 1
        for chunk in chunks:
            result.chunks += 1
            if (ids := digest(chunk.token_ids)) in known:
                continue  # equal chunks share their blocks
            known.add(ids)
            num_tokens, num_blocks = len(chunk.token_ids), len(kinds(chunk.token_ids))
            rounded = -(-num_tokens // _STEP_TOKENS) * _STEP_TOKENS
            sizes[rounded] = sizes.get(rounded, 0) + num_blocks
            result.blocks += num_blocks
            result.tokens += num_blocks * num_tokens
            if num_tokens > len(sample):
                sample = tuple(chunk.token_ids)
    if sample:
        result.nbytes = _bytes_by_codec(model, sizes)
        result.tokens_per_s = _rate(kinds(sample), sample)
    return result


def _bytes_by_codec(model: Model, sizes: dict[int, int]) -> dict[str, int]:
    found = {}
    for name in codec_names():
        made = codec(name, fine=fine_channels(model)) if name == "int4" else codec(name)
        found[name] = sum(
            count * _block_bytes(model, made.encode, tokens) for tokens, count in sizes.items()
        )
    return found


def _block_bytes(model: Model, encode: Callable[..., object], tokens: int) -> int:
    """Of a block's header and segments; what a codec makes of noise is as long as of anything."""
    config = model.decoder.config
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(config.num_kv_heads, tokens, config.head_dim, generator=generator)
    k = k.to(model.decoder.dtype)
    total = _ALIGNMENT
    for layer in range(config.num_layers):
        nbytes = memoryview(encode(k, k, layer=layer)).nbytes  # type: ignore[arg-type]
        total += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return total


def _rate(kinds: Sequence[ChunkBlocks], token_ids: tuple[int, ...]) -> float:
    """Tokens of blocks a second, computed and encoded, prefixes aside."""
    for kind in kinds:
        kind.compute(token_ids)  # the first computes the prefix, too
    begun, tokens = time.perf_counter(), 0
    while time.perf_counter() - begun < _MEASURED_S:
        for kind in kinds:
            kind.compute(token_ids)
            tokens += len(token_ids)
    return tokens / (time.perf_counter() - begun)
