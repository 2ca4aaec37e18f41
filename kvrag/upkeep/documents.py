"""Documents of a home listed and deleted without opening a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrag.config import Settings
from kvrag.home import existing_home
from kvrag.references import References
from kvrag.retrieval.catalog import Catalog, StoredDocument
from kvrag.store.tiered import TieredStore, at_once
from kvrag.tiers import tier_slots

__all__ = ["Removed", "list_documents", "remove_documents"]


@dataclass(slots=True)
class Removed:
    """Ids by what became of them. `owed`: blocks that some tier could not be made to delete yet."""

    deleted: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    owed: int = 0


def list_documents(
    settings: Settings, *, limit: int, offset: int
) -> tuple[int, list[StoredDocument]]:
    """How many documents the namespace has, and some of them in the order of their adding.

    Raises:
        SettingsError: there is no such home.
    """
    home = existing_home(settings)
    if not home.catalog.is_file():
        return 0, []
    with Catalog.open(home.catalog) as catalog:
        total = catalog.counts(settings.namespace).documents
        return total, catalog.documents(settings.namespace, limit, offset)


def remove_documents(settings: Settings, ids: Sequence[str]) -> Removed:
    """Delete documents of the namespace as `Engine.delete` does; the others are told as unknown.

    Raises:
        SettingsError: there is no such home.
        MissingExtraError, TierError: as `tier_slots`.
    """
    home = existing_home(settings)
    wanted = list(dict.fromkeys(ids))
    if not home.catalog.is_file():
        return Removed(unknown=wanted)
    removed = Removed()
    with (
        # Books of a Redis, which a walk over its keys fills, are of no use for deleting.
        TieredStore(tier_slots(settings), aside=lambda work: None) as store,
        Catalog.open(home.catalog) as catalog,
    ):
        references = References(catalog, store, aside=at_once)
        for document_id in wanted:
            known = references.delete_document(settings.namespace, document_id)
            (removed.deleted if known else removed.unknown).append(document_id)
        removed.owed = catalog.num_owed_deletions()
    return removed
