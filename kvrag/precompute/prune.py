"""Documents whose files are gone leave the corpus, on request."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvrag.corpus import Corpus
from kvrag.references import References
from kvrag.retrieval.loaders.places import is_gone, lies_within

__all__ = ["prune"]


def prune(corpus: Corpus, references: References, paths: Iterable[Path | str]) -> int:
    """Delete the documents that came from files below `paths` alone, all of which are gone.

    Returns how many were deleted. A file that is there and cannot be read is not gone.
    """
    given = list(paths)
    catalog, namespace = corpus.catalog, corpus.namespace
    num_deleted = 0
    for origin in catalog.origins(namespace):
        if any(lies_within(origin, path) for path in given) and is_gone(origin):
            for document_id in catalog.documents_from(namespace, origin):
                if catalog.drop_origin(namespace, origin, document_id):
                    num_deleted += references.delete_document(namespace, document_id)
    return num_deleted
