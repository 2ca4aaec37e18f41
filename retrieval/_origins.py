"""Which files the documents of a catalog came from."""

from __future__ import annotations

from collections.abc import Iterator

from ._catalog_file import BATCH_ROWS, CatalogFile

__all__ = ["Origins"]


class Origins(CatalogFile):
    """A document may come from several files, and from none ('')."""

    def add_origin(self, namespace: str, origin: str, document_id: str) -> None:
        """Note that a document came from `origin`; '' is from no file. Nothing if it is gone."""
        values = (namespace, origin, document_id)
        known = "SELECT 1 FROM origins WHERE namespace = ? AND origin = ? AND document_id = ?"
        if self._rows(known, values):  # the common case, which must not wait for a writer
            return
        with self.writing() as db:
            db.execute(
                "INSERT INTO origins (namespace, origin, document_id) SELECT namespace, ?, id "
                "FROM documents WHERE namespace = ? AND id = ? ON CONFLICT DO NOTHING",
                (origin, namespace, document_id),
            )

    def drop_origin(self, namespace: str, origin: str, document_id: str) -> bool:
        """A document is no longer in `origin`; whether it came from nowhere else."""
        with self.writing() as db:
            db.execute(
                "DELETE FROM origins WHERE namespace = ? AND origin = ? AND document_id = ?",
                (namespace, origin, document_id),
            )
            left = "SELECT 1 FROM origins WHERE namespace = ? AND document_id = ? LIMIT 1"
            return not db.execute(left, (namespace, document_id)).fetchall()

    def documents_from(self, namespace: str, origin: str) -> set[str]:
        """Ids of the documents that came from `origin`."""
        rows = self._rows(
            "SELECT document_id FROM origins WHERE namespace = ? AND origin = ?",
            (namespace, origin),
        )
        return {document_id for (document_id,) in rows}

    def origins_of(self, namespace: str, document_id: str) -> list[str]:
        """Every file that a document came from, ascending; '' is from none."""
        rows = self._rows(
            "SELECT origin FROM origins WHERE namespace = ? AND document_id = ? ORDER BY origin",
            (namespace, document_id),
        )
        return [origin for (origin,) in rows]

    def origins(self, namespace: str) -> Iterator[str]:
        """Yield every file that documents came from, once, ascending."""
        after = ""
        while rows := self._rows(
            "SELECT DISTINCT origin FROM origins WHERE namespace = ? AND origin > ? "
            "ORDER BY origin LIMIT ?",
            (namespace, after, BATCH_ROWS),
        ):
            after = rows[-1][0]
            yield from (origin for (origin,) in rows)
