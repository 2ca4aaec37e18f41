"""A corpus out of the file of an exported one.

First every byte is held against its checksums, and every row checked; then each block is verified
and stored under a key of this home; last, one transaction makes the corpus appear. What ends it
before that leaves no corpus: what was stored is deleted, or, after a kill, belongs to nobody, so
that the same import finds it and `kvrag store gc` deletes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kvrag.blocks import ChunkBlocks, fine_channels
from kvrag.config import Settings
from kvrag.corpora.archive import Archive, Member
from kvrag.corpora.listing import corpus_exists
from kvrag.corpora.lock import corpus_held
from kvrag.corpora.manifest import Manifest
from kvrag.corpora.parts import CorpusParts
from kvrag.corpora.rows import read_documents
from kvrag.corpora.settings import check_settings, fine_of
from kvrag.engine import Engine
from kvrag.errors import CorpusFileError, CorpusSettingsError, InputError
from kvrag.precompute.job import StorageFullError
from kvrag.precompute.lock import Waiting, only_job
from kvrag.precompute.manifest import digest
from kvrag.retrieval.errors import CatalogError, RetrievalError
from kvrag.retrieval.records import DocumentCopy
from kvrag.store.block import (
    MAX_HEADER_NBYTES,
    Block,
    BlockHeader,
    decode_header,
    encode_header,
    verify_segments,
)
from kvrag.store.codecs import Codec, codec
from kvrag.store.errors import BlockFormatError, StoreError, UnencodableError, UnknownCodecError
from kvrag.store.keys import BlockKey, packed
from kvrag.upkeep.standing import Report, Standing

__all__ = ["Imported", "import_corpus"]

#: Bytes of a number in the widest dtype, and what a codec may write beside its numbers.
_WIDEST, _BESIDE = 8, 1 << 16


@dataclass(frozen=True, slots=True)
class Imported:
    """What the corpus has. `codec`: what it is to be used with."""

    name: str
    documents: int
    chunks: int
    blocks: int
    codec: str


def import_corpus(
    settings: Settings, path: Path, name: str | None, *, waiting: Waiting, report: Report
) -> Imported:
    """Make the corpus `name`, or that of its name in the file, of an exported one.

    Raises:
        InputError: there is no such file, it is of another format version, or the home has a
            corpus of that name.
        CorpusSettingsError: the corpus is of another model, dtype, tokenizer or codec version.
        CorpusFileError: the file is damaged, cut short or made up; nothing is taken from it.
        StorageFullError: no durable tier takes a block.
        CatalogError, TierError: the home cannot be used.
    """
    with Archive.open(path) as archive:
        manifest = Manifest.loads(archive.manifest)
        name = Settings(namespace=manifest.name).namespace if name is None else name
        with Engine.open(settings) as engine:
            parts = engine.corpus_parts()
            with (
                corpus_held(parts.home, name, waiting),
                only_job(parts.home.import_lock, waiting),
            ):
                return _Import(archive, manifest, parts, name, report).run()


class _Import:
    def __init__(
        self, archive: Archive, manifest: Manifest, parts: CorpusParts, name: str, report: Report
    ) -> None:
        self._archive, self._manifest, self._parts = archive, manifest, parts
        self._name, self._report = name, report
        self._chunks: set[str] = set()
        #: By the number of its prefix, each block of the file that this home has, by packed key.
        self._held: list[set[bytes]] = []
        self._put: list[BlockKey] = []

    def run(self) -> Imported:
        if corpus_exists(self._parts.catalog, self._name):
            raise InputError(
                f"the home has a corpus {self._name!r}; give another name (--as), or drop it first"
            )
        kinds = self._kinds()
        self._archive.check()
        num_documents = self._check_rows()
        try:
            self._store_blocks(kinds)
            self._restore(kinds)
        except BaseException:
            self._take_back()
            raise
        blocks = sum(map(len, self._held))
        # Another process with a full disk may have evicted what belonged to nobody until now. What
        # there is no room for is computed when it is wanted.
        with suppress(StorageFullError):
            self._store_blocks(kinds)
        num_chunks = self._parts.catalog.counts(self._name).chunks
        return Imported(self._name, num_documents, num_chunks, blocks, self._manifest.codec)

    # ---- what the file is of ---------------------------------------------------------------------

    def _kinds(self) -> list[ChunkBlocks]:
        """The blocks of each prefix, under the name in this home."""
        manifest, model = self._manifest, self._parts.model
        dtype = str(model.decoder.dtype).removeprefix("torch.")
        for what, theirs, ours in (
            ("tokenizer", manifest.tokenizer, model.tokenizer.digest),
            ("dtype", manifest.dtype, dtype),
            ("model", manifest.model, model.fingerprint),
        ):
            if theirs != ours:
                raise CorpusSettingsError(
                    f"the file is of another {what} ({theirs:.64}) than that of the settings "
                    f"({ours:.64}): set that one, or add the documents again (kvrag precompute)"
                )
        check_settings(manifest.settings, model.tokenizer, model.decoder.config.vocab_size)
        made_by = self._codec()
        ours_made = (made_by.name, made_by.version, made_by.params_digest)
        theirs_made = (manifest.codec, manifest.codec_version, manifest.codec_digest)
        if theirs_made != ours_made:
            raise CorpusSettingsError(
                f"the file's blocks are of codec {theirs_made}, and this release has {ours_made}"
            )
        room = model.decoder.config.max_positions
        vocab = model.decoder.config.vocab_size
        for prefix in manifest.prefixes:
            if len(prefix.token_ids) >= room or any(one >= vocab for one in prefix.token_ids):
                raise CorpusFileError("the manifest has a prefix that the model does not take")
        return [
            self._parts.blocks_in(self._name, made_by, prefix.token_ids)
            for prefix in manifest.prefixes
        ]

    def _codec(self) -> Codec:
        manifest, model = self._manifest, self._parts.model
        try:
            if manifest.codec != "int4":
                return codec(manifest.codec)
            fixed = manifest.settings.get(f"codec int4 {model.fingerprint}")
            return codec("int4", fine=fine_channels(model) if fixed is None else fine_of(fixed))
        except (UnknownCodecError, UnencodableError) as exc:
            raise CorpusSettingsError(f"the file's codec is not to be had: {exc}") from exc

    # ---- rows ------------------------------------------------------------------------------------

    def _check_rows(self) -> int:
        """How many documents there are. Notes which chunks."""
        count = num_chunks = 0
        for document in self._documents(lambda token_ids: ()):
            count += 1
            num_chunks += len(document.chunks)
            self._chunks.update(digest(chunk.token_ids) for chunk in document.chunks)
            self._report(Standing("documents", count, self._manifest.documents))
        if (count, num_chunks) != (self._manifest.documents, self._manifest.chunks):
            raise CorpusFileError(
                f"the file has {count} documents of {num_chunks} chunks, and announces "
                f"{self._manifest.documents} of {self._manifest.chunks}"
            )
        return count

    def _documents(
        self, blocks: Callable[[Sequence[int]], Sequence[tuple[str, str]]]
    ) -> Iterator[DocumentCopy]:
        tokenizer = self._parts.model.tokenizer
        return read_documents(self._archive.lines(), tokenizer, blocks, dim=self._dim())

    def _dim(self) -> int | None:
        """Of the vectors that the file must have; None for those of another embedder."""
        with suppress(CorpusSettingsError, RetrievalError):  # none that could search the corpus
            embedder = self._parts.corpus.embedder
            if embedder.fingerprint == self._manifest.embedder:
                return embedder.dim
        return None

    def _restore(self, kinds: Sequence[ChunkBlocks]) -> None:
        def referred(token_ids: Sequence[int]) -> Sequence[tuple[str, str]]:
            keys = [(kind.scope, kind.key(token_ids)) for kind in kinds]
            held = zip(keys, self._held, strict=True)
            return [(scope, str(key)) for (scope, key), of in held if packed(key) in of]

        try:
            made = self._parts.catalog.restore(
                self._name,
                self._documents(referred),
                self._manifest.settings,
                tokenizer=self._manifest.tokenizer,
                embedder=self._manifest.embedder,
            )
        except ValueError as exc:
            raise CorpusFileError(f"the documents of the file do not fit together: {exc}") from exc
        if not made:
            raise InputError(f"documents were added to {self._name!r} meanwhile")

    # ---- blocks ----------------------------------------------------------------------------------

    def _store_blocks(self, kinds: Sequence[ChunkBlocks]) -> None:
        """Store every block of the file that no durable tier has."""
        self._held = [set() for _ in kinds]
        members = self._archive.blocks
        for done, member in enumerate(members, start=1):
            prefix = member.prefix or 0
            if prefix >= len(kinds):
                raise CorpusFileError("the file has a block of a prefix that it does not name")
            header = self._header(member)
            key = kinds[prefix].key(header.token_ids)
            if not self._parts.store.holds_durably(key):
                self._store(kinds[prefix], key, header, self._archive.read(member))
            self._held[prefix].add(packed(key))
            self._report(Standing("blocks", done, len(members)))

    def _header(self, member: Member) -> BlockHeader:
        """The header of a block, which is what the manifest says and as long as the member."""
        try:
            header = decode_header(self._archive.start(member, MAX_HEADER_NBYTES))
        except BlockFormatError as exc:
            raise CorpusFileError(f"the file holds what is no block: {exc}") from exc
        manifest, config = self._manifest, self._parts.model.decoder.config
        shape = (config.num_layers, config.num_kv_heads, len(header.token_ids), config.head_dim)
        found = (header.kind, header.fingerprint, header.dtype, header.k_shape, header.v_shape)
        expected = ("chunk", manifest.model, manifest.dtype, shape, shape)
        made_by = (header.codec, header.codec_version, header.codec_digest)
        if found != expected or made_by != (
            manifest.codec,
            manifest.codec_version,
            manifest.codec_digest,
        ):
            raise CorpusFileError("the file holds a block of another model or codec than it says")
        if digest(header.token_ids) not in self._chunks:
            raise CorpusFileError("the file holds a block of a chunk that it does not hold")
        most = 2 * shape[1] * shape[2] * shape[3] * _WIDEST + _BESIDE
        longest = max(part.length for part in header.segments)
        if header.nbytes != member.size or longest > most or header.extra:
            raise CorpusFileError("the file holds a block whose size is not that of its KV")
        return header

    def _store(self, kind: ChunkBlocks, key: BlockKey, header: BlockHeader, data: bytes) -> None:
        view = memoryview(data)
        segments = tuple(view[part.offset : part.end] for part in header.segments)
        try:
            verify_segments(header, 0, segments)
            own = replace(header, key=key)
            block = Block(own, encode_header(own), segments)
            kind.layers(block)  # may not fit the header: no checksum tells
        except BlockFormatError as exc:
            raise CorpusFileError(f"the file holds a damaged block: {exc}") from exc
        self._parts.store.protect([key])
        self._put.append(key)
        outcome = kind.put(block, durable_only=True)
        if not outcome.durable:
            reasons = "; ".join(f"{tier}: {reason}" for tier, reason in outcome.refused)
            raise StorageFullError(f"a block of the file could not be stored ({reasons})")

    def _take_back(self) -> None:
        """What fails here is left to `kvrag store gc`.

        Documents that somebody added meanwhile keep the blocks that they have in common.
        """
        with suppress(StoreError, CatalogError):
            referred = set(self._parts.catalog.block_keys_of(self._name))
            unreferred = [key for key in self._put if str(key) not in referred]
            self._parts.store.unprotect(unreferred)
            self._parts.store.delete_unprotected(unreferred)
