"""The corpora of a home, from its catalog and its disk. Opens no model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field

from kvrag.config import Settings
from kvrag.errors import InputError
from kvrag.home import Home, existing_home
from kvrag.retrieval.catalog import Catalog, Counts
from kvrag.store.errors import BlockFormatError
from kvrag.store.keys import BlockKey
from kvrag.store.sealing import is_sealed
from kvrag.store.tier import Tier
from kvrag.tiers import open_tier

__all__ = ["CorpusFacts", "Kind", "corpus_exists", "describe", "existing_corpus", "list_corpora"]

#: What whoever makes a corpus writes first, see `kvrag.fixed`.
_MADE = "corpus_instruction"
_NOTED = {
    "embedder": "corpus_embedder",
    "chunk_tokens": "corpus_chunk_tokens",
    "instruction": _MADE,
    "corpus_context": "corpus_context",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """Blocks of one model, codec and prefix, as one of them says; None where it cannot be read.

    Encrypted ones tell neither model nor dtype, and their codec is the encryption.
    """

    blocks: int
    model: str | None
    dtype: str | None
    codec: str | None


@dataclass(slots=True)
class CorpusFacts:
    """Of one corpus. `nbytes`: of its blocks on disk; `missing`: how many are not there.

    made_with: what its maker fixed: `embedder` (a fingerprint), `chunk_tokens`, `instruction` and
    `corpus_context`, as text; what a corpus of an older release did not note is left out.
    """

    name: str
    documents: int
    chunks: int
    blocks: int
    nbytes: int
    missing: int
    made_with: dict[str, str]
    kinds: list[Kind] = field(default_factory=list)


def corpus_exists(catalog: Catalog, name: str) -> bool:
    """Whether somebody made a corpus of that name, which may have no documents any more."""
    return catalog.setting(name, _MADE) is not None or catalog.counts(name).documents > 0


def existing_corpus(settings: Settings) -> Home:
    """The home of the settings, if it has the corpus that they name.

    Raises:
        SettingsError: there is no such home.
        InputError: it has no such corpus; names those that it has.
    """
    home, name = existing_home(settings), settings.namespace
    names: list[str] = []
    if home.catalog.is_file():
        with Catalog.open(home.catalog) as catalog:
            if corpus_exists(catalog, name):
                return home
            names = [other for other in catalog.seen_namespaces() if corpus_exists(catalog, other)]
    known = ", ".join(map(repr, names)) if names else "none at all"
    raise InputError(f"there is no corpus {name!r} in {home.path}; there is {known}")


def list_corpora(settings: Settings) -> list[CorpusFacts]:
    """All corpora of the home, by name.

    Raises:
        SettingsError: there is no such home.
        TierError: its disk cannot be read.
    """
    home = existing_home(settings)
    if not home.catalog.is_file():
        return []
    with Catalog.open(home.catalog) as catalog, closing(open_tier(settings, "disk")) as disk:
        names = [name for name in catalog.seen_namespaces() if corpus_exists(catalog, name)]
        sizes = {entry.key: entry.nbytes for entry in disk.entries()}
        return [_facts(catalog, disk, name, sizes) for name in names]


def describe(settings: Settings) -> tuple[CorpusFacts, list[str]]:
    """The corpus that the settings name, and the files that its documents came from.

    Raises as `existing_corpus` and `list_corpora`.
    """
    home, name = existing_corpus(settings), settings.namespace
    with Catalog.open(home.catalog) as catalog, closing(open_tier(settings, "disk")) as disk:
        sizes = {entry.key: entry.nbytes for entry in disk.entries()}
        facts = _facts(catalog, disk, name, sizes)
        return facts, [origin for origin in catalog.origins(name) if origin]


def _facts(catalog: Catalog, disk: Tier, name: str, sizes: Mapping[BlockKey, int]) -> CorpusFacts:
    counts: Counts = catalog.counts(name)
    nbytes = missing = 0
    for text in catalog.block_keys_of(name):
        size = sizes.get(BlockKey.parse(text))
        nbytes += size or 0
        missing += size is None
    fixed = catalog.settings(name)
    made_with = {what: fixed[key] for what, key in _NOTED.items() if key in fixed}
    kinds = [
        _kind(disk, BlockKey.parse(scope.sample), scope.blocks) for scope in catalog.scopes(name)
    ]
    return CorpusFacts(
        name, counts.documents, counts.chunks, counts.blocks, nbytes, missing, made_with, kinds
    )


def _kind(disk: Tier, key: BlockKey, blocks: int) -> Kind:
    try:
        header = disk.header(key)
    except BlockFormatError:
        header = None
    if header is None:
        return Kind(blocks, None, None, None)
    if is_sealed(header):
        return Kind(blocks, None, None, header.codec)
    return Kind(blocks, header.fingerprint, header.dtype, header.codec)
