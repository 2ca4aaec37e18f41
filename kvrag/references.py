"""Which blocks the corpus refers to: the catalog is the truth, the store protects what it says.

A reference is written before its block is protected, and both before the block is put; deleting a
document takes them back in the other order. One lock keeps adding and deleting apart.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from kvrag.retrieval.catalog import Catalog
from kvrag.retrieval.errors import CatalogError
from kvrag.store.errors import TierError
from kvrag.store.keys import BlockKey
from kvrag.store.tiered import TieredStore

__all__ = ["References"]

_log = logging.getLogger(__name__)


class References:
    """References of chunks to blocks, of one home. Thread-safe."""

    def __init__(self, catalog: Catalog, store: TieredStore) -> None:
        self._catalog, self._store = catalog, store
        self._lock = threading.RLock()
        self._version: int | None = None
        self._seen = 0  # the number of the last reference protected by `refresh`
        self.refresh()

    def refresh(self) -> None:
        """Protect what other processes have referred to since the last call.

        Every query calls it, also while another process makes a corpus: it looks at nothing twice.
        """
        with self._lock:
            version = self._catalog.data_version()
            if version != self._version:
                for number, key in self._catalog.block_refs_above(self._seen):
                    self._store.protect([BlockKey.parse(key)])
                    self._seen = number
                self._version = version

    def add(self, key: BlockKey, chunk_id: int, scope: str) -> bool:
        """Refer to a block and protect it; False if the chunk is gone."""
        with self._lock:
            if not self._catalog.add_block_ref(str(key), chunk_id, scope):
                return False
            self._store.protect([key])
            return True

    def add_for_query(self, chunks: Iterable[tuple[BlockKey, int, str]]) -> None:
        """As `add`, for chunks that were retrieved: a catalog that fails costs no answer."""
        try:
            for key, chunk_id, scope in chunks:
                self.add(key, chunk_id, scope)
        except CatalogError as exc:
            _log.warning("blocks of this answer may be evicted: %s", exc)

    def delete_document(self, namespace: str, document_id: str) -> bool:
        """Delete a document and the blocks that nothing refers to any more; False if absent."""
        with self._lock:
            deleted = self._catalog.delete_document(namespace, document_id)
            if deleted is None:
                return False
            orphans = [BlockKey.parse(key) for key in deleted.orphaned_block_keys]
            self._store.unprotect(orphans)
            for key in orphans:
                try:
                    self._store.delete(key)
                except TierError as exc:
                    # Unprotected, it goes like any block that nobody asks for.
                    _log.warning("block %s stays until it is evicted: %s", key, exc)
            return True
