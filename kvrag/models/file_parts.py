"""A file that may come in parts, because a package registry bounds the size of one package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvrag.errors import ModelError, ModelNotFoundError

__all__ = ["FileParts"]

_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class FileParts:
    """The parts of one file in their order.

    Args:
        name: of the whole file.
        sha256: of the whole file, checked when parts are joined; a single part is taken as it is.
    """

    name: str
    paths: tuple[Path, ...]
    sha256: str | None = None

    def digest(self) -> str:
        """32 hexadecimal digits of the content, the same however it is cut.

        Raises:
            ModelNotFoundError: a part cannot be read.
        """
        digest = xxhash.xxh3_128()
        for block in self._content():
            digest.update(block)
        return digest.hexdigest()

    @contextmanager
    def whole(self, folder: Path) -> Iterator[Path]:
        """The file in one piece; parts are joined in `folder` for as long as the context lasts.

        Raises:
            ModelNotFoundError: a part cannot be read.
            ModelError: the parts are not the file that they should be.
        """
        if len(self.paths) == 1:
            yield self.paths[0]
            return
        joined = folder / self.name
        try:
            digest = hashlib.sha256()
            with joined.open("wb") as file:
                for block in self._content():
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != self.sha256:
                raise ModelError(
                    f"{self.name}, joined from {len(self.paths)} parts beginning with "
                    f"{self.paths[0]}, has the SHA-256 {digest.hexdigest()}, not {self.sha256}; "
                    "install its packages again"
                )
            yield joined
        finally:
            joined.unlink(missing_ok=True)

    def _content(self) -> Iterator[bytes]:
        for path in self.paths:
            try:
                with path.open("rb") as file:
                    while block := file.read(_READ_BYTES):
                        yield block
            except OSError as exc:
                raise ModelNotFoundError(f"{path} cannot be read: {exc.strerror}") from exc
