"""What a catalog notes of stored KV: which chunks refer to which block, and what is to be deleted.

Block keys and scopes are opaque text here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ._catalog_file import BATCH_ROWS, CatalogFile, check_name

__all__ = ["BlockRefs"]


class BlockRefs(CatalogFile):
    """References of chunks to blocks, and the deletions that are owed for those that left."""

    def add_block_ref(self, key: str, chunk_id: int, scope: str) -> bool:
        """Note that block `key` holds the KV of a chunk in `scope`; noted already is fine.

        scope: what makes blocks of one chunk differ (model, codec, corpus prefix), as one text.
        False if the chunk is gone: nothing then refers to the block, and its writer deletes it.
        """
        check_name("block key", key)
        known = self._rows(
            "SELECT 1 FROM block_refs WHERE chunk_id = ? AND scope = ? AND block_key = ?",
            (int(chunk_id), scope, key),
        )
        if known:  # the common case of a query, which must not wait for a writer
            return True
        with self.writing() as db:
            exists = db.execute("SELECT namespace FROM chunks WHERE id = ?", (int(chunk_id),))
            row = exists.fetchone()
            if row is None:
                return False
            db.execute(
                "INSERT INTO block_refs (chunk_id, namespace, scope, block_key) "
                "VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (int(chunk_id), row[0], scope, key),
            )
            db.execute("DELETE FROM owed_deletions WHERE block_key = ?", (key,))
        return True

    def forget_block(self, key: str) -> int:
        """Drop all references to a block that the store lost; returns how many there were."""
        with self.writing() as db:
            return db.execute("DELETE FROM block_refs WHERE block_key = ?", (key,)).rowcount

    def block_keys(self) -> Iterator[str]:
        """Yield every key that some chunk refers to, once, ascending."""
        after = ""
        while rows := self._rows(
            "SELECT DISTINCT block_key FROM block_refs WHERE block_key > ? "
            "ORDER BY block_key LIMIT ?",
            (after, BATCH_ROWS),
        ):
            after = rows[-1][0]
            yield from (key for (key,) in rows)

    def block_chunks(self, key: str) -> list[int]:
        """The ids of the chunks that refer to a block, ascending."""
        rows = self._rows(
            "SELECT DISTINCT chunk_id FROM block_refs WHERE block_key = ? ORDER BY 1", (key,)
        )
        return [chunk_id for (chunk_id,) in rows]

    def block_refs_above(self, number: int) -> Iterator[tuple[int, str]]:
        """Yield (number, block key) of the references noted later than that one, ascending.

        Numbers grow, and none is given twice; 0 is before all. A key comes as often as it was
        referred to.
        """
        yield from self._pages(
            "SELECT id, block_key FROM block_refs WHERE id > ? ORDER BY id LIMIT ?",
            (),
            after=number,
        )

    def owed_deletions(self) -> Iterator[str]:
        """Yield the keys of blocks that documents left behind and that may lie somewhere still."""
        after = ""
        while rows := self._rows(
            "SELECT block_key FROM owed_deletions WHERE block_key > ? ORDER BY block_key LIMIT ?",
            (after, BATCH_ROWS),
        ):
            after = rows[-1][0]
            yield from (key for (key,) in rows)

    def num_owed_deletions(self) -> int:
        """How many blocks `owed_deletions` names."""
        return int(self._rows("SELECT count(*) FROM owed_deletions", ())[0][0])

    def settle_deletions(self, keys: Sequence[str]) -> None:
        """The blocks are deleted wherever they lay."""
        with self.writing() as db:
            db.executemany(
                "DELETE FROM owed_deletions WHERE block_key = ?", [(key,) for key in keys]
            )

    def chunks_without_block(self, namespace: str, scope: str) -> Iterator[int]:
        """Yield the ids of chunks that have no block in `scope`, ascending."""
        for (chunk_id,) in self._pages(
            "SELECT id FROM chunks c WHERE namespace = ? AND NOT EXISTS ("
            "  SELECT 1 FROM block_refs r WHERE r.chunk_id = c.id AND r.scope = ?"
            ") AND id > ? ORDER BY id LIMIT ?",
            (namespace, scope),
        ):
            yield chunk_id
