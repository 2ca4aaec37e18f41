"""Dropping a corpus: what it consists of, and what was fixed for it. Opens no model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from kvrag.config import Settings
from kvrag.corpora.listing import existing_corpus
from kvrag.corpora.lock import corpus_held, refused
from kvrag.references import References
from kvrag.retrieval.catalog import Catalog
from kvrag.store.tiered import TieredStore, at_once
from kvrag.tiers import tier_slots

__all__ = ["Dropped", "drop_corpus"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """How much is gone. `owed`: blocks that some tier could not be made to delete yet."""

    documents: int
    chunks: int
    blocks: int
    owed: int


def drop_corpus(settings: Settings) -> Dropped:
    """Delete the corpus that the settings name: at once from the catalog, then its blocks.

    A kill in between leaves blocks that are owed to be deleted: the next use of the home does so.

    Raises:
        SettingsError, InputError: there is no such home, or no such corpus.
        CorpusBusyError: a job works on it.
        CatalogError, TierError: the home cannot be used.
    """
    home, name = existing_corpus(settings), settings.namespace
    with (
        corpus_held(home, name, refused(name)),
        # Books of a Redis, which a walk over its keys fills, are of no use for deleting.
        TieredStore(tier_slots(settings), aside=lambda work: None) as store,
        Catalog.open(home.catalog) as catalog,
    ):
        counts = catalog.counts(name)
        References(catalog, store, aside=at_once).drop_namespace(name)
        shutil.rmtree(home.corpus_index(name), ignore_errors=True)  # a cache of what is gone
        owed = catalog.num_owed_deletions()
    return Dropped(counts.documents, counts.chunks, counts.blocks, owed)
