"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kvrag.errors import CorpusFileError
from kvrag.store.files import open_new, sync_folder

__all__ = ["whole_file"]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, for its owner alone, that takes the place of `path` when the block ends well.

    Raises CorpusFileError for any OSError in the block, with `path`: a full disk does not say
    which file it was.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        try:
            with os.fdopen(open_new(partial), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as exc:
        raise CorpusFileError(f"{path} cannot be written: {exc.strerror or exc}") from exc
