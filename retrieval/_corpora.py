"""A catalog's namespaces as wholes: what fixed each, what it refers to, what is wrong in it.

Settings, scopes and block keys are opaque text here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ._catalog_file import BATCH_ROWS
from ._lexical_table import drop_table, table_of
from ._vectors import Vectors
from .terms import terms

__all__ = ["Corpora", "Scope"]


@dataclass(frozen=True, slots=True)
class Scope:
    """Blocks of a namespace that have all in common but their chunk, and the key of one of them."""

    name: str
    blocks: int
    sample: str


class Corpora(Vectors):
    """What is asked and done of a whole namespace."""

    def settings(self, namespace: str) -> dict[str, str]:
        """Every setting of a namespace, by name, sorted."""
        rows = self._rows(
            "SELECT key, value FROM settings WHERE namespace = ? ORDER BY key", (namespace,)
        )
        return dict(rows)

    def scopes(self, namespace: str) -> list[Scope]:
        """Every scope that chunks of the namespace have blocks in, the largest first."""
        rows = self._rows(
            "SELECT scope, count(DISTINCT block_key), min(block_key) FROM block_refs "
            "WHERE namespace = ? GROUP BY scope ORDER BY 2 DESC, scope",
            (namespace,),
        )
        return [Scope(*row) for row in rows]

    def block_keys_of(self, namespace: str) -> Iterator[str]:
        """Yield every key that some chunk of the namespace refers to, once, ascending."""
        after = ""
        while rows := self._rows(
            "SELECT DISTINCT block_key FROM block_refs WHERE namespace = ? AND block_key > ? "
            "ORDER BY block_key LIMIT ?",
            (namespace, after, BATCH_ROWS),
        ):
            after = rows[-1][0]
            yield from (key for (key,) in rows)

    def block_refs_of(self, chunk_ids: Sequence[int]) -> list[set[tuple[str, str]]]:
        """The (scope, block key) that each chunk refers to, in line with the ids."""
        found: dict[int, set[tuple[str, str]]] = {}
        for chunk_id, scope, key in self._rows_of_ids(
            "SELECT chunk_id, scope, block_key FROM block_refs WHERE chunk_id IN ({ids})", chunk_ids
        ):
            found.setdefault(chunk_id, set()).add((scope, key))
        return [found.get(int(chunk_id), set()) for chunk_id in chunk_ids]

    def drop_namespace(self, namespace: str) -> tuple[str, ...]:
        """Delete documents, settings and words of a namespace, in one transaction.

        Returns the keys of the blocks that nothing refers to any more, whose deletion is owed from
        then on, as after `delete_document`. What remains is a number that never comes back, and
        the name: in a tier that several homes share, it tells which blocks are this one's.
        """
        with self.writing() as db:
            orphans = db.execute(
                "SELECT DISTINCT block_key FROM block_refs r WHERE namespace = ? AND NOT EXISTS ("
                "  SELECT 1 FROM block_refs o"
                "  WHERE o.block_key = r.block_key AND o.namespace != r.namespace"
                ") ORDER BY block_key",
                (namespace,),
            ).fetchall()
            rows = self._rows("SELECT id FROM chunks WHERE namespace = ? ORDER BY id", (namespace,))
            chunk_ids = [chunk_id for (chunk_id,) in rows]
            db.execute("DELETE FROM documents WHERE namespace = ?", (namespace,))
            db.execute("DELETE FROM settings WHERE namespace = ?", (namespace,))
            drop_table(db, namespace)
            db.executemany("INSERT INTO owed_deletions VALUES (?) ON CONFLICT DO NOTHING", orphans)
            self._log_has_deleted = True
            self._bump_generation(namespace, chunk_ids)
        return tuple(key for (key,) in orphans)

    # ---- mending ------------------------------------------------------------------------------

    def damage(self) -> list[str]:
        """What SQLite finds wrong in the whole file, in its words; reads all of it."""
        found = [text for (text,) in self._rows("PRAGMA integrity_check(20)", ()) if text != "ok"]
        broken = self._rows("PRAGMA foreign_key_check", ())
        return found + [f"row {row[1]} of {row[0]} belongs to no row of {row[2]}" for row in broken]

    def ids_without_words(self, namespace: str, chunk_ids: Sequence[int]) -> list[int]:
        """Those of the chunks whose row in the full-text table is absent or of another text.

        None where the table is behind as a whole: it is caught up with at the next search.
        """
        with self.reading() as db:
            table = table_of(db, namespace)
        if table is None:
            return []
        found = {
            row[0]: row[1:]
            for row in self._rows_of_ids(
                f"SELECT rowid, title, text FROM {table} WHERE rowid IN ({{ids}})", chunk_ids
            )
        }
        chunks = self._rows_of_ids(
            "SELECT id, title, text FROM chunks WHERE id IN ({ids})", chunk_ids
        )
        return [
            chunk_id
            for chunk_id, title, text in chunks
            if found.get(chunk_id) != (" ".join(terms(title)), " ".join(terms(text)))
        ]

    def words_in_excess(self, namespace: str) -> int:
        """How many rows the full-text table has more than the namespace has chunks."""
        with self.reading() as db:
            table = table_of(db, namespace)
        if table is None:
            return 0
        rows = self._rows(
            f"SELECT (SELECT count(*) FROM {table}) - "
            "(SELECT count(*) FROM chunks WHERE namespace = ?)",
            (namespace,),
        )
        return max(0, int(rows[0][0]))

    def drop_words(self, namespace: str) -> None:
        """Delete the full-text table, which is made anew by `LexicalIndex.catch_up`."""
        with self.writing() as db:
            drop_table(db, namespace)

    def drop_block_refs(self, chunk_id: int, keys: Sequence[str]) -> None:
        """A chunk refers to those blocks no more; what nothing refers to is owed to be deleted."""
        with self.writing() as db:
            for key in keys:
                values = (int(chunk_id), key)
                db.execute("DELETE FROM block_refs WHERE chunk_id = ? AND block_key = ?", values)
                db.execute(
                    "INSERT INTO owed_deletions SELECT ? WHERE NOT EXISTS ("
                    "  SELECT 1 FROM block_refs WHERE block_key = ?"
                    ") ON CONFLICT DO NOTHING",
                    (key, key),
                )
