"""Blocks of chunks: their keys, opening them, and computing the ones that are not there.

Only this module writes `chunk` blocks, and only from the isolated computation: the chunk alone
behind its corpus prefix. Everything that a block's bytes depend on is in its key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import Buffer

from kvrag.blocks.single_flight import Made, SingleFlight
from kvrag.errors import PromptTooLongError
from kvrag.fusion.stream import LayerKV
from kvrag.generation.kv_cache import KVCache
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.models.forward import append
from kvrag.models.source import Model
from kvrag.store.block import Block, BlockHeader, encode_block, encode_header
from kvrag.store.codecs import Codec, RawCodec
from kvrag.store.errors import BlockFormatError, StoreError
from kvrag.store.keys import BlockKey, KeyMaker
from kvrag.store.tiered import BlockReader, Expected, PutOutcome, TieredStore

__all__ = ["MOST_WAIT_S", "ChunkBlocks", "open_chunks"]

#: Seconds for which one waits for what another computes, before it does so itself.
MOST_WAIT_S = 30.0

#: The codec whose blocks have every bit of what was computed.
_LOSSLESS = RawCodec()


class ChunkBlocks:
    """The chunk blocks of one model, codec, namespace and corpus prefix. Thread-safe."""

    def __init__(
        self,
        model: Model,
        store: TieredStore,
        keys: KeyMaker,
        codec: Codec,
        prefixes: PrefixCache,
        *,
        namespace: str,
        prefix_ids: Sequence[int],
        flights: SingleFlight | None = None,
    ) -> None:
        """`flights`: of all that may want the same blocks; default: of this object's users."""
        self._flights = flights or SingleFlight()
        self._model, self._store, self._keys = model, store, keys
        self._prefixes, self._namespace = prefixes, namespace
        self.codec = codec
        self.prefix_ids = tuple(prefix_ids)

    def key(self, token_ids: Sequence[int]) -> BlockKey:
        """The key of a chunk, independent of its neighbours, its place and the tier."""
        return self._keys.key(
            namespace=self._namespace,
            kind="chunk",
            fingerprint=self._model.fingerprint,
            codec=self.codec.name,
            codec_version=self.codec.version,
            codec_digest=self.codec.params_digest,
            prefix_ids=self.prefix_ids,
            token_ids=token_ids,
        )

    @property
    def scope(self) -> str:
        """What these blocks have in common (model, codec, prefix, namespace), as one text."""
        return str(self.key(()))

    def fits(self, token_ids: Sequence[int]) -> bool:
        """Whether the model's context holds a chunk behind this prefix."""
        room = self._model.decoder.config.max_positions
        return len(self.prefix_ids) + len(token_ids) <= room

    def open(self, token_ids: Sequence[int], *, whole: bool = False) -> BlockReader | None:
        """A verified reader, or None if no tier has a sound copy of the model's shape.

        `whole`: all of it will be read, see `TieredStore.open_many`.
        """
        return open_chunks([(self, token_ids)], whole=whole)[0]

    def _expected(self, token_ids: Sequence[int]) -> Expected:
        key = self.key(token_ids)
        return Expected(key, "chunk", self._model.fingerprint, tuple(token_ids))

    def _fitting(self, reader: BlockReader) -> BlockReader | None:
        """The reader, or None, and it is closed, if its block has not the model's shape."""
        header, shape = reader.header, self._shape(reader.header.token_ids)
        if (header.k_shape, header.v_shape, header.dtype) == (shape, shape, self._dtype):
            return reader
        reader.close()
        return None

    def prepare(self) -> None:
        """Have the prefix computed, which happens once; `compute` does it otherwise."""
        decoder = self._model.decoder
        cache = KVCache(
            decoder.config,
            len(self.prefix_ids),
            dtype=decoder.compute_dtype,
            device=decoder.device,
        )
        self._prefixes.fill(cache, self.prefix_ids)

    def compute(self, token_ids: Sequence[int]) -> Block:
        """The chunk's block, computed alone behind the corpus prefix; the prefix's KV is dropped.

        The same bytes on every call on the same machine with the same number of threads.

        Raises:
            PromptTooLongError: prefix and chunk exceed the model's context.
        """
        decoder = self._model.decoder
        if not self.fits(token_ids):
            raise PromptTooLongError(
                f"a chunk of {len(token_ids)} tokens behind a prefix of {len(self.prefix_ids)} "
                f"exceeds the model's context, which holds {decoder.config.max_positions}"
            )
        cache = KVCache(
            decoder.config,
            len(self.prefix_ids) + len(token_ids),
            dtype=decoder.compute_dtype,
            device=decoder.device,
        )
        self._prefixes.fill(cache, self.prefix_ids)
        segments: list[Buffer] = []

        def encode(k: Tensor, v: Tensor) -> None:
            k, v = k.to(decoder.dtype), v.to(decoder.dtype)
            segments.append(self.codec.encode(k, v, layer=len(segments)))

        append(decoder, token_ids, cache, sink=encode)
        return self._block(token_ids, segments)

    def owns(self, header: BlockHeader, keys: KeyMaker) -> bool:
        """Whether that block, under whatever codec and made with `keys`, is of these."""
        if (header.kind, header.fingerprint) != ("chunk", self._model.fingerprint):
            return False
        return header.key == keys.key(
            namespace=self._namespace,
            kind="chunk",
            fingerprint=header.fingerprint,
            codec=header.codec,
            codec_version=header.codec_version,
            codec_digest=header.codec_digest,
            prefix_ids=self.prefix_ids,
            token_ids=header.token_ids,
        )

    def can_recode(self, header: BlockHeader) -> bool:
        """Whether a block of that header becomes, without a pass, what `compute` makes.

        Only what lost nothing does, and what this very codec made: a key says how its block was
        rounded, and what was rounded twice must not pass for what was rounded once.
        """
        shape = self._shape(header.token_ids)
        if (header.k_shape, header.v_shape, header.dtype) != (shape, shape, self._dtype):
            return False
        return header.codec == _LOSSLESS.name or self._made(header)

    @torch.inference_mode()
    def recoded(self, block: Block) -> Block:
        """The block of the same chunk under this codec. Ask `can_recode` first.

        Raises:
            BlockFormatError, UnencodableError: its numbers cannot be read, or not be encoded.
        """
        header = block.header
        segments: list[Buffer] = []
        for layer, (part, segment) in enumerate(zip(header.segments, block.segments, strict=True)):
            if self._made(header):
                segments.append(segment[: part.length])
            else:
                k, v = _LOSSLESS.decode(segment[: part.length], header)
                segments.append(self.codec.encode(k, v, layer=layer))
        return self._block(header.token_ids, segments)

    def _made(self, header: BlockHeader) -> bool:
        """Whether this codec made the block, with these parameters."""
        codec = self.codec
        made_by = (header.codec, header.codec_version, header.codec_digest)
        return made_by == (codec.name, codec.version, codec.params_digest)

    def _block(self, token_ids: Sequence[int], segments: Sequence[Buffer]) -> Block:
        shape = self._shape(token_ids)
        return encode_block(
            key=self.key(token_ids),
            kind="chunk",
            fingerprint=self._model.fingerprint,
            token_ids=token_ids,
            k_shape=shape,
            v_shape=shape,
            dtype=self._dtype,
            codec=self.codec.name,
            codec_version=self.codec.version,
            codec_digest=self.codec.params_digest,
            segments=segments,
        )

    @property
    def _dtype(self) -> str:
        return str(self._model.decoder.dtype).removeprefix("torch.")

    def _shape(self, token_ids: Sequence[int]) -> tuple[int, int, int, int]:
        config = self._model.decoder.config
        return (config.num_layers, config.num_kv_heads, len(token_ids), config.head_dim)

    def make(
        self,
        token_ids: Sequence[int],
        compute: Callable[[], Block],
        *,
        cancelled: Callable[[], bool] = lambda: False,
        most_s: float = MOST_WAIT_S,
    ) -> Made | None:
        """`compute`, which stores what it makes, unless another is about it: see `SingleFlight`."""
        return self._flights.make(
            self.key(token_ids),
            compute,
            load=lambda: self._load(token_ids),
            cancelled=cancelled,
            most_s=most_s,
        )

    def _load(self, token_ids: Sequence[int]) -> Block | None:
        """The whole block, or None. A miss is not counted: that was done when it was opened."""
        if not self._store.contains(self.key(token_ids)):
            return None
        reader = self.open(token_ids, whole=True)
        if reader is None:
            return None
        with reader:
            header = reader.header
            try:
                segments = reader.read(0, len(header.segments))
                block = Block(header, encode_header(header), tuple(segments))
                self.layers(block)  # may not fit the header: no checksum tells
            except (StoreError, BlockFormatError):
                return None
        return block

    def put(self, block: Block, *, durable_only: bool = False) -> PutOutcome:
        """Store a computed block. See `TieredStore.put`."""
        return self._store.put(block.header.key, block, durable_only=durable_only)

    @torch.inference_mode()
    def layers(self, block: Block) -> list[LayerKV]:
        """Un-rotated K and V of a computed block, layer by layer, as its bytes have them.

        A request that had to compute a block goes on with what later ones will load. Raises
        `BlockFormatError` if a segment is too short.
        """
        header = block.header
        return [
            self.codec.decode(segment[: part.length], header)
            for part, segment in zip(header.segments, block.segments, strict=True)
        ]


def open_chunks(
    wanted: Sequence[tuple[ChunkBlocks, Sequence[int]]], *, whole: bool = False
) -> list[BlockReader | None]:
    """`ChunkBlocks.open` of each, in order, for which each tier is asked once. All of one store."""
    if not wanted:
        return []
    store = wanted[0][0]._store
    readers = store.open_many([blocks._expected(ids) for blocks, ids in wanted], whole=whole)
    return [
        None if reader is None else blocks._fitting(reader)
        for (blocks, _), reader in zip(wanted, readers, strict=True)
    ]
