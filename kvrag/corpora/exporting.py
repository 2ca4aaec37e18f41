"""A corpus as one file: documents, chunks, vectors, and the blocks of one model and codec.

Streamed: memory holds a batch of rows or one block, and some 200 bytes for each block written.

Blocks leave an encrypted home opened: the file is as readable as the catalog, which holds the text
in clear. Their keys were made under the home's secret, which stays here: they lead nowhere, and
whoever imports the blocks makes new ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from kvrag.blocks import ChunkBlocks
from kvrag.config import Settings
from kvrag.corpora.archive import MANIFEST, ArchiveWriter, block_name, rows_name
from kvrag.corpora.listing import existing_corpus
from kvrag.corpora.lock import corpus_held
from kvrag.corpora.manifest import Manifest, Prefix
from kvrag.corpora.parts import CorpusParts
from kvrag.corpora.rows import written_rows
from kvrag.engine import Engine
from kvrag.errors import CorpusBusyError, CorpusSettingsError, InputError
from kvrag.precompute.lock import Waiting
from kvrag.store.errors import BlockFormatError
from kvrag.store.keys import BlockKey, packed
from kvrag.store.maintenance import read_settled
from kvrag.store.tier import Tier
from kvrag.tiers import open_disk
from kvrag.upkeep.standing import Report, Standing
from kvrag.whole_file import whole_file

__all__ = ["Exported", "export_corpus"]

_ROWS_NBYTES = 8 << 20
_BATCH = 256
#: Settings of the namespace that are its corpus's; others belong to another model or tokenizer.
_FIXED = ("corpus_instruction", "corpus_context", "corpus_embedder", "corpus_chunk_tokens")


@dataclass(slots=True)
class Exported:
    """What the file holds. missing: blocks that the disk has not, or not sound, by key.

    left_out: blocks of other models and codecs. was_encrypted: they are not in the file.
    """

    documents: int = 0
    chunks: int = 0
    blocks: int = 0
    nbytes: int = 0
    left_out: int = 0
    missing: list[str] = field(default_factory=list)
    was_encrypted: bool = False


def export_corpus(settings: Settings, path: Path, *, waiting: Waiting, report: Report) -> Exported:
    """Write the corpus that the settings name to `path`, whole or not at all; replaces a file.

    Raises:
        SettingsError, InputError: there is no such home or corpus, or `path` is a folder.
        CorpusSettingsError: the corpus has no KV of the settings' model and codec.
        CorpusBusyError: the corpus was changed meanwhile by others than jobs.
        DamagedCorpusError: a chunk lacks something.
        CorpusFileError: the file cannot be written, say because its disk is full.
    """
    home, name = existing_corpus(settings), settings.namespace
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the file to be written")
    with Engine.open(settings) as engine, corpus_held(home, name, waiting):
        parts = engine.corpus_parts()
        exported = Exported(was_encrypted=home.encryption_id.exists())
        generation = parts.catalog.generation(name)
        manifest = _manifest(parts)
        exported.left_out = _num_left_out(parts)
        with closing(open_disk(settings)) as disk, whole_file(path) as file:
            writer = ArchiveWriter(file)
            writer.add(MANIFEST, [manifest.dumps()])
            _write_rows(writer, parts, manifest, exported)
            _write_blocks(writer, parts, disk, exported, report)
            writer.finish()
            exported.nbytes = file.tell()
            if parts.catalog.generation(name) != generation:
                raise CorpusBusyError(
                    f"the corpus {name!r} was changed while it was exported; try again"
                )
    return exported


def _manifest(parts: CorpusParts) -> Manifest:
    model, name, codec = parts.model, parts.settings.namespace, parts.blocks.codec
    settings, counts = parts.catalog.settings(name), parts.catalog.counts(name)
    owned = (f"layout {model.tokenizer.digest} ", f"codec {codec.name} {model.fingerprint}")
    kept = {key: settings[key] for key in settings if key in _FIXED or key.startswith(owned)}
    embedder = settings.get("corpus_embedder") or parts.corpus.embedder.fingerprint
    return Manifest(
        name=name,
        model=model.fingerprint,
        dtype=str(model.decoder.dtype).removeprefix("torch."),
        tokenizer=model.tokenizer.digest,
        embedder=embedder,
        codec=codec.name,
        codec_version=codec.version,
        codec_digest=codec.params_digest,
        prefixes=tuple(Prefix(blocks.prefix_ids) for blocks in parts.blocks.all),
        settings=kept,
        documents=counts.documents,
        chunks=counts.chunks,
    )


def _num_left_out(parts: CorpusParts) -> int:
    """Raises CorpusSettingsError if all of the corpus's KV is of others."""
    scopes = parts.catalog.scopes(parts.settings.namespace)
    mine = {blocks.scope for blocks in parts.blocks.all}
    others = sum(scope.blocks for scope in scopes if scope.name not in mine)
    if scopes and others == sum(scope.blocks for scope in scopes):
        raise CorpusSettingsError(
            f"the corpus {parts.settings.namespace!r} has {others} blocks, and none is of the "
            f"settings' model and dtype under the codec {parts.settings.codec!r}: give those that "
            "it was made with (kvrag corpus show), or compute others (kvrag precompute)"
        )
    return others


def _write_rows(
    writer: ArchiveWriter, parts: CorpusParts, manifest: Manifest, exported: Exported
) -> None:
    lines: list[bytes] = []
    nbytes = number = 0
    for line in written_rows(parts.corpus, manifest.embedder):
        lines.append(line)
        nbytes += len(line)
        if nbytes >= _ROWS_NBYTES:
            number += 1
            writer.add(rows_name(number), lines)
            lines, nbytes = [], 0
    if lines:
        writer.add(rows_name(number + 1), lines)
    exported.documents, exported.chunks = manifest.documents, manifest.chunks


def _write_blocks(
    writer: ArchiveWriter, parts: CorpusParts, disk: Tier, exported: Exported, report: Report
) -> None:
    seen: set[bytes] = set()
    total = parts.catalog.counts(parts.settings.namespace).blocks - exported.left_out
    for prefix, key in _wanted(parts):
        if packed(key) in seen:
            continue
        seen.add(packed(key))
        try:
            block = read_settled(disk, key)
        except BlockFormatError:
            block = None
        if block is None:
            exported.missing.append(str(key))
            continue
        exported.blocks += 1
        name = block_name(prefix, exported.blocks)
        writer.add(name, [block.header_bytes, *block.segments])
        report(Standing("blocks", len(seen), total))


def _wanted(parts: CorpusParts) -> Iterator[tuple[int, BlockKey]]:
    """The blocks that the chunks refer to, with the place of their prefix in the manifest."""
    catalog, corpus = parts.catalog, parts.corpus
    for chunk_ids in _batches(catalog.chunk_ids(corpus.namespace)):
        referred = catalog.block_refs_of(chunk_ids)
        for chunk_id, refs in zip(chunk_ids, referred, strict=True):
            token_ids = corpus.token_ids(chunk_id)
            if token_ids is None:
                continue
            for prefix, blocks in enumerate(parts.blocks.all):
                key = _referred(blocks, token_ids, refs)
                if key is not None:
                    yield prefix, key


def _referred(
    blocks: ChunkBlocks, token_ids: Sequence[int], refs: set[tuple[str, str]]
) -> BlockKey | None:
    key = blocks.key(token_ids)
    return key if (blocks.scope, str(key)) in refs else None


def _batches(ids: Iterator[int]) -> Iterator[list[int]]:
    while batch := list(islice(ids, _BATCH)):
        yield batch
