"""Which blocks the corpus refers to: the catalog is the truth, the store protects what it says.

A reference is written before its block is protected, and both before the block is put; deleting a
document takes them back in the other order. One lock keeps adding and deleting apart, and is held
for the catalog alone: every query takes it.

The blocks that a deleted document leaves are owed to be deleted from then on, in the catalog: a
tier that is away at that moment gives them up when it is back, were it after a restart.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from kvrag.retrieval.catalog import Catalog, DeletedDocument
from kvrag.retrieval.errors import CatalogError
from kvrag.store.errors import StoreError
from kvrag.store.health import Clock, Health
from kvrag.store.keys import BlockKey
from kvrag.store.tiered import Aside, TieredStore, aside

__all__ = ["References"]

_log = logging.getLogger(__name__)


class References:
    """References of chunks to blocks, of one home. Thread-safe.

    `num_owed`: blocks that are still to be deleted, as of the last `refresh` or deletion.
    """

    def __init__(
        self,
        catalog: Catalog,
        store: TieredStore,
        *,
        clock: Clock = time.monotonic,
        aside: Aside = aside,
    ) -> None:
        """`aside` runs what is owed; default: in a thread of its own."""
        self._catalog, self._store = catalog, store
        self._lock = threading.RLock()
        self._version: int | None = None
        self._seen = 0  # the number of the last reference protected by `refresh`
        #: When to try what is owed again: as a tier that fails.
        self._deletions, self._aside = Health(clock), aside
        self.num_owed = 0
        self.refresh()
        if self.num_owed:
            self._begin(self._settle)

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
                self.num_owed = self._catalog.num_owed_deletions()
                self._version = version
        if self._deletions.claim_trial():
            self._begin(self._settle_again)

    def add(self, key: BlockKey, chunk_id: int, scope: str) -> bool:
        """Refer to a block and protect it; False if the chunk is gone."""
        with self._lock:
            if not self._catalog.add_block_ref(str(key), chunk_id, scope):
                return False
            self._store.protect([key])
            if self.num_owed:  # perhaps that of this block
                self._count_owed()
            return True

    def add_for_query(self, chunks: Iterable[tuple[BlockKey, int, str]]) -> None:
        """As `add`, for chunks that were retrieved: a catalog that fails costs no answer."""
        try:
            for key, chunk_id, scope in chunks:
                self.add(key, chunk_id, scope)
        except CatalogError as exc:
            _log.warning("blocks of this answer may be evicted: %s", exc)

    def delete_document(self, namespace: str, document_id: str) -> bool:
        """Delete a document and the blocks that nothing refers to any more; False if absent.

        True also while a tier fails that may hold some: they are deleted when it is back.
        """
        with self._lock:
            deleted = self._catalog.delete_document(namespace, document_id)
            self._unprotect(deleted)
        return self._forget(deleted)

    def replace_document(self, replace: Callable[[], DeletedDocument | None]) -> bool:
        """Run `replace`, and delete what it leaves as `delete_document` does; False if nothing."""
        with self._lock:
            deleted = replace()
            self._unprotect(deleted)
        return self._forget(deleted)

    def drop_namespace(self, namespace: str) -> None:
        """Delete a namespace as `Catalog.drop_namespace` does, and the blocks that it leaves."""
        with self._lock:
            orphans = self._catalog.drop_namespace(namespace)
            self._store.unprotect(map(BlockKey.parse, orphans))
        self._delete(orphans)

    def _unprotect(self, deleted: DeletedDocument | None) -> None:
        if deleted is not None:
            self._store.unprotect(map(BlockKey.parse, deleted.orphaned_block_keys))

    def _forget(self, deleted: DeletedDocument | None) -> bool:
        if deleted is not None:
            self._delete(deleted.orphaned_block_keys)
        return deleted is not None

    def _settle(self) -> None:
        try:
            self._delete(list(self._catalog.owed_deletions()))
            if self._catalog.num_owed_deletions():
                self._deletions.failed("deletion")
            else:
                self._deletions.worked("deletion")
        except CatalogError as exc:
            _log.warning("blocks of deleted documents stay for now: %s", exc)
            self._deletions.failed("deletion")

    def _settle_again(self) -> None:
        try:
            self._settle()
        finally:
            self._deletions.end_trial()

    def _delete(self, names: Sequence[str]) -> None:
        """Delete blocks, or have it tried again."""
        if not names:
            return
        known = not self._deletions.healthy
        try:
            self._store.delete_unprotected([BlockKey.parse(name) for name in names])
            self._catalog.settle_deletions(names)
        except (StoreError, CatalogError) as exc:
            self._deletions.failed("deletion")
            _log.log(
                logging.DEBUG if known else logging.WARNING,
                "%d blocks of deleted documents may stay until this works: %s",
                len(names),
                exc,
            )
        self._count_owed()

    def _count_owed(self) -> None:
        with contextlib.suppress(CatalogError):  # then the number stays as it was
            self.num_owed = self._catalog.num_owed_deletions()

    def _begin(self, work: Callable[[], None]) -> None:
        try:
            self._aside(work)
        except RuntimeError as exc:  # no thread is to be had
            self._deletions.failed("deletion")
            self._deletions.end_trial()
            _log.warning("blocks of deleted documents stay for now: %s", exc)
