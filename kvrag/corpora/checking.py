"""A corpus's parts held against one another, and mended.

What is compared: each chunk's text with its token ids, its vector and its words; its references
with what the model's blocks of these ids are called; and every block with its checksums. The text
is believed, since all else can be made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np

from kvrag.config import Settings
from kvrag.corpora.listing import existing_corpus
from kvrag.corpora.lock import corpus_held
from kvrag.corpora.parts import CorpusParts
from kvrag.engine import Engine
from kvrag.precompute.lock import Waiting
from kvrag.retrieval.catalog import StoredChunk
from kvrag.retrieval.chunking import render_chunk
from kvrag.retrieval.lexical import LexicalIndex
from kvrag.store.keys import BlockKey
from kvrag.store.maintenance import verify_blocks
from kvrag.store.tier import Tier
from kvrag.tiers import open_disk
from kvrag.upkeep.standing import Report, Standing

__all__ = ["CorpusChecked", "Part", "Problem", "check_corpus"]

Part = Literal["catalog", "text", "token_ids", "vector", "words", "reference", "block"]

_BATCH = 128
#: Of a vector and one that is made anew, beside other texts perhaps.
_SAME = 0.999


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, in a sentence, with which part of the corpus; with which chunk, or block."""

    part: Part
    what: str
    chunk: int | None = None
    block: str | None = None


@dataclass(slots=True)
class CorpusChecked:
    """What was looked at and found. `nbytes`: of sound blocks.

    index_current: whether the index file is what the catalog says; another is made anew by the next
    search. problems: as they were found; left: those that are there after the repair, or all of
    them without one.
    """

    chunks: int = 0
    blocks: int = 0
    nbytes: int = 0
    index_current: bool = True
    problems: list[Problem] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)


def check_corpus(
    settings: Settings, *, repair: bool, waiting: Waiting, report: Report
) -> CorpusChecked:
    """Check the corpus that the settings name, with the model and codec of the settings.

    With `repair`, what can be made anew is: token ids, vectors, words and the index from the text,
    references and blocks as a job makes them.

    Raises:
        SettingsError, InputError: there is no such home, or no such corpus.
        CorpusSettingsError: it was made with another embedder.
        CatalogError, TierError: the home cannot be used.
    """
    home, name = existing_corpus(settings), settings.namespace
    with Engine.open(settings) as engine, corpus_held(home, name, waiting):
        parts = engine.corpus_parts()
        with closing(open_disk(settings)) as disk:
            checked = _Check(parts, disk, report).run(repair=False)
            checked.left = checked.problems
            if not repair:
                return checked
            if checked.problems:
                _Check(parts, disk, report).run(repair=True)
                engine.complete()
                checked.left = _Check(parts, disk, report).run(repair=False).problems
        parts.corpus.forget_index()
        parts.corpus.prepare()
        checked.index_current = parts.corpus.index_is_saved
    return checked


class _Check:
    """One walk over the corpus."""

    def __init__(self, parts: CorpusParts, disk: Tier, report: Report) -> None:
        self._parts, self._disk, self._report = parts, disk, report
        self._corpus, self._catalog = parts.corpus, parts.catalog
        self._name = parts.settings.namespace
        self._kinds = parts.blocks.all
        self._checked = CorpusChecked()
        self._repair = False

    def run(self, *, repair: bool) -> CorpusChecked:
        self._repair = repair
        for sentence in self._catalog.damage():
            self._found("catalog", f"SQLite says: {sentence}")
        for document in self._catalog.iter_documents(self._name):
            if not document.num_chunks:
                self._found("text", f"document {document.id} has no chunks: add it again")
        self._check_chunks()
        self._check_blocks()
        self._checked.index_current = self._corpus.index_is_saved
        return self._checked

    def _found(
        self, part: Part, what: str, chunk: int | None = None, block: str | None = None
    ) -> None:
        self._checked.problems.append(Problem(part, what, chunk, block))

    # ---- chunks ----------------------------------------------------------------------------------

    def _check_chunks(self) -> None:
        total = self._catalog.counts(self._name).chunks
        words = self._catalog.words_in_excess(self._name)
        if words:
            self._found("words", f"{words} rows of words belong to no chunk")
        wordless = words > 0
        for chunk_ids in _batches(self._catalog.chunk_ids(self._name)):
            found = zip(chunk_ids, self._catalog.chunk(chunk_ids), strict=True)
            chunks = [chunk for _, chunk in found if chunk is not None]
            self._checked.chunks += len(chunks)
            self._check_tokens(chunks)
            self._check_vectors(chunks)
            lost = self._catalog.ids_without_words(self._name, [chunk.id for chunk in chunks])
            for chunk_id in lost:
                self._found("words", "its words are not those of its text", chunk_id)
            wordless |= bool(lost)
            self._check_references(chunks)
            self._report(Standing("chunks", self._checked.chunks, total))
        if wordless and self._repair:
            self._catalog.drop_words(self._name)
            LexicalIndex(self._catalog, self._name).catch_up()

    def _check_tokens(self, chunks: Sequence[StoredChunk]) -> None:
        tokenizer = self._parts.model.tokenizer
        stored = self._catalog.token_ids([chunk.id for chunk in chunks], tokenizer.digest)
        for chunk, token_ids in zip(chunks, stored, strict=True):
            right = tokenizer.encode(render_chunk(chunk.title, chunk.text))
            if token_ids == right:
                continue
            if token_ids is not None:  # else those of another tokenizer: made when they are wanted
                self._found("token_ids", "its token ids are not those of its text", chunk.id)
            if self._repair:
                self._catalog.set_token_ids(chunk.id, tokenizer.digest, right)

    def _check_vectors(self, chunks: Sequence[StoredChunk]) -> None:
        embedder, ids = self._corpus.embedder, [chunk.id for chunk in chunks]
        texts = [render_chunk(chunk.title, chunk.text) for chunk in chunks]
        made = embedder.embed_documents(texts)
        wrong: list[int] = []
        for row, vector in enumerate(self._catalog.vectors(ids, embedder.fingerprint)):
            if vector is None:
                self._found("vector", "it has no vector", ids[row])
            elif vector.shape != made[row].shape or not float(vector @ made[row]) >= _SAME:
                self._found("vector", "its vector is not that of its text", ids[row])
            elif abs(float(np.linalg.norm(vector)) - 1) > 1 - _SAME:
                self._found("vector", "its vector has not the length 1", ids[row])
            else:
                continue
            wrong.append(row)
        if wrong and self._repair:
            doomed = [ids[row] for row in wrong]
            self._catalog.drop_vectors(doomed, embedder.fingerprint)
            self._catalog.set_vectors(doomed, made[wrong], embedder.fingerprint)
            self._corpus.forget_index()

    # ---- references and blocks -------------------------------------------------------------------

    def _check_references(self, chunks: Sequence[StoredChunk]) -> None:
        ids = [chunk.id for chunk in chunks]
        first = self._parts.settings.first_blocks
        scopes = {kind.scope for kind in self._kinds}
        for chunk_id, refs in zip(ids, self._catalog.block_refs_of(ids), strict=True):
            token_ids = self._corpus.token_ids(chunk_id)
            if token_ids is None:
                continue
            mine = {(kind.scope, str(kind.key(token_ids))) for kind in self._kinds}
            for kind in self._parts.blocks.kinds(token_ids, first=first):
                if (kind.scope, str(kind.key(token_ids))) not in refs:
                    what = "it refers to no block of the settings' model and codec"
                    self._found("reference", what, chunk_id)
            stray = sorted(
                key for scope, key in refs if scope in scopes and (scope, key) not in mine
            )
            for key in stray:
                self._found("reference", "it refers to a block of other ids", chunk_id, key)
            if stray and self._repair:
                self._catalog.drop_block_refs(chunk_id, stray)

    def _check_blocks(self) -> None:
        keys = [BlockKey.parse(key) for key in self._catalog.block_keys_of(self._name)]
        seen: set[BlockKey] = set()
        for found in verify_blocks(self._disk, keys, repair=self._repair):
            seen.add(found.key)
            self._checked.blocks += 1
            self._checked.nbytes += found.nbytes
            if found.damage is not None:
                self._found("block", found.damage, block=str(found.key))
            self._report(Standing("blocks", self._checked.blocks, len(keys)))
        for key in keys:
            if key not in seen:
                self._found("block", "it is not on disk", block=str(key))


def _batches(ids: Iterator[int]) -> Iterator[list[int]]:
    while batch := list(islice(ids, _BATCH)):
        yield batch
