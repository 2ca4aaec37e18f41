"""Chunks of a corpus that are nearly the same. Opens no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from kvrag.config import Settings
from kvrag.corpora.listing import existing_corpus
from kvrag.retrieval.catalog import Catalog
from kvrag.retrieval.near_duplicates import near_duplicates

__all__ = ["NearlyTheSame", "nearly_the_same"]

_BATCH = 512


@dataclass(frozen=True, slots=True)
class NearlyTheSame:
    """A chunk of a group."""

    chunk: int
    document: str
    title: str


def nearly_the_same(settings: Settings, threshold: float) -> list[list[NearlyTheSame]]:
    """Groups of chunks of the corpus that the settings name, see `near_duplicates`.

    Raises:
        SettingsError, InputError: there is no such home, or no such corpus.
    """
    home, name = existing_corpus(settings), settings.namespace
    with Catalog.open(home.catalog) as catalog:
        groups = near_duplicates(_texts(catalog, name), threshold)
        return [
            [
                NearlyTheSame(chunk.id, chunk.document_id, chunk.title)
                for chunk in catalog.chunk(group)
                if chunk is not None
            ]
            for group in groups
        ]


def _texts(catalog: Catalog, name: str) -> Iterator[tuple[int, str]]:
    ids = catalog.chunk_ids(name)
    while batch := list(islice(ids, _BATCH)):
        yield from ((chunk.id, chunk.text) for chunk in catalog.chunk(batch) if chunk is not None)
