"""Parquet: one document a row, read in small batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..documents import Document
from ..errors import DocumentError, needs_extra
from .file import File, Skipped, reason
from .jsonl import document_of

__all__ = ["load_parquet"]

_BATCH_ROWS = 64


def load_parquet(file: File) -> Iterator[Document | Skipped]:
    """A column `text`, perhaps `title` and `metadata`; all others are metadata.

    Raises:
        DocumentError: no Parquet that can be read, without rows, or without a column `text`.
        MissingExtraError: pyarrow is not installed.
    """
    with needs_extra("pyarrow", "Parquet", extra="parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    row = 0
    try:
        table = pq.ParquetFile(file.stream)
        if "text" not in table.schema_arrow.names:
            names = ", ".join(map(str, table.schema_arrow.names))
            raise DocumentError(f'there is no column "text" among {names or "none"}')
        for batch in table.iter_batches(_BATCH_ROWS):
            for fields in batch.to_pylist():
                row += 1
                source = f"{file.source}:{row}"
                try:
                    file.check_size(fields["text"])
                    yield document_of(_plain(fields), source, file.origin)
                except DocumentError as exc:
                    yield Skipped(source, reason(exc))
    except (pa.ArrowException, OSError) as exc:
        raise DocumentError(f"not Parquet that can be read: {reason(exc)}") from exc
    if not row:
        raise DocumentError("empty")


def _plain(value: Any) -> Any:
    """What JSON holds as it is; what it does not, such as a date, as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
