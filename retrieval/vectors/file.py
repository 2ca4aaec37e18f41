"""The index on disk: files of FAISS, one a version, and a JSON sidecar that names the one in force.

Behind what FAISS has written, a file holds the number of each row.

The sidecar is replaced last, at once, and holds the file's checksum: whatever a crash, or two
processes that save at once, leave behind, there is the version before or the one behind. A file
that no sidecar names any more is removed by who replaced the sidecar, or after an hour.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64

from .base import Structure
from .kinds import opened
from .rows import ChunkRows

__all__ = ["IndexFile", "IndexIdentity", "SavedIndex"]

_BLOCK_BYTES = 1 << 20
_SIDECAR_BYTES = 64 << 10
_FORMAT = 2
_ABANDONED_S = 3600.0
_TRIES = 3
_NUMBER = np.dtype("<i8")  # of a row, behind FAISS's own bytes


@dataclass(frozen=True, slots=True)
class IndexIdentity:
    """What an index file must have been made from to be of use."""

    catalog: str
    namespace: str
    embedder: str
    dim: int


@dataclass(frozen=True, slots=True)
class SavedIndex:
    """An index as a file has it: of the namespace's state at `generation`."""

    structure: Structure
    rows: ChunkRows
    generation: int


class IndexFile:
    """The file of `identity` at `path`, of which the name is that of the files without a version.

    `x.faiss` has versions `x.<16 hex digits>.faiss` and the sidecar `x.json`.
    """

    def __init__(
        self, faiss: Any, path: Path, identity: IndexIdentity, log: logging.Logger
    ) -> None:
        self._faiss, self._path, self._identity, self._log = faiss, path, identity, log
        self._sidecar = path.with_suffix(".json")

    def generation(self) -> int | None:
        """The state of the namespace that the file holds, as far as its sidecar tells."""
        with suppress(OSError, ValueError):
            facts = self._facts()
            if facts is not None:
                return int(facts["generation"])
        return None

    def read(self) -> SavedIndex | None:
        """The index, or None if it is absent or not to be trusted (logged)."""
        for _ in range(_TRIES):
            try:
                facts = self._facts()
            except FileNotFoundError:
                self._log.info("there is no index at %s; building it", self._path)
                return None
            except (OSError, ValueError, RecursionError) as exc:
                self._warn(f"cannot be read ({exc})")
                return None
            if facts is None:
                self._log.info("the index %s is of something else; rebuilding it", self._path)
                return None
            try:
                return self._read(self._version(str(facts["file"])), facts)
            except FileNotFoundError:
                continue  # another process has written the next version
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as exc:
                self._warn(f"cannot be read ({exc})")
                return None
        self._warn("lacks its file")
        return None

    def write(self, structure: Structure, rows: ChunkRows, generation: int) -> bool:
        """Write file and sidecar, each by temporary file, fsync and replace; False if it fails."""
        path = self._version(f"{self._path.stem}.{secrets.token_hex(8)}.faiss")
        temporary = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = self._named()
            self._remove_abandoned(before)
            self._faiss.write_index(structure.index, str(temporary))
            with temporary.open("ab") as file:
                file.write(rows.to_file().astype(_NUMBER).tobytes())
            facts = {
                "format": _FORMAT,
                "identity": asdict(self._identity),
                "generation": generation,
                "kind": structure.kind,
                "file": path.name,
                "xxh3_64": _checksum(temporary),
            }
            _replace(temporary, path)
            temporary.write_text(json.dumps(facts), encoding="utf-8")
            _replace(temporary, self._sidecar)
            if before is not None:
                before.unlink(missing_ok=True)
        except (OSError, RuntimeError) as exc:  # FAISS reports a full disk as RuntimeError
            self._log.warning("the index %s was not saved: %s", self._path, exc)
            with suppress(OSError):
                temporary.unlink()
            return False
        return True

    def _facts(self) -> dict[str, Any] | None:
        """The sidecar of this format and identity. Raises OSError, ValueError, RecursionError."""
        with self._sidecar.open("rb") as file:
            facts = json.loads(file.read(_SIDECAR_BYTES))
        if not isinstance(facts, dict):
            raise ValueError("its sidecar is no object")  # noqa: TRY004
        wanted = {"format": _FORMAT, "identity": asdict(self._identity)}
        return facts if wanted.items() <= facts.items() else None

    def _read(self, path: Path, facts: dict[str, Any]) -> SavedIndex | None:
        generation = int(facts["generation"])
        if facts["xxh3_64"] != _checksum(path):
            self._warn("is damaged")
            return None
        index = self._faiss.read_index(str(path))
        # Kinds are compared, not trusted: the checksum tells damage, not who wrote the file.
        structure = opened(self._faiss, index) if index.d == self._identity.dim else None
        if structure is None:
            self._warn("is of another kind")
            return None
        nbytes = index.ntotal * _NUMBER.itemsize
        with path.open("rb") as file:
            file.seek(-nbytes, os.SEEK_END)
            numbers = np.frombuffer(file.read(), dtype=_NUMBER)
        return SavedIndex(structure, ChunkRows.from_file(numbers.astype(np.int64)), generation)

    def _version(self, name: str) -> Path:
        path = self._path.with_name(name)
        if path.parent != self._path.parent:
            raise ValueError(f"its sidecar names {name!r:.80}")
        return path

    def _named(self) -> Path | None:
        """The file that the sidecar names, whatever it is of."""
        try:
            facts = json.loads(self._sidecar.read_bytes()[:_SIDECAR_BYTES])
            path = self._version(facts["file"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return path if path.match(f"{self._path.stem}.*.faiss") else None

    def _remove_abandoned(self, in_force: Path | None) -> None:
        """What killed saves and older releases left; young files may be another's work."""
        stem = self._path.stem
        for pattern in (f".{stem}.*.partial", f"{stem}.*.faiss"):
            for leftover in self._path.parent.glob(pattern):
                with suppress(FileNotFoundError):
                    age_s = time.time() - leftover.stat().st_mtime
                    if leftover != in_force and age_s > _ABANDONED_S:
                        leftover.unlink()
        for older in (self._path, self._path.with_name(f"{self._path.name}.json")):
            older.unlink(missing_ok=True)

    def _warn(self, what: str) -> None:
        self._log.warning("the index %s %s; rebuilding it", self._path, what)


def _checksum(path: Path) -> str:
    digest = xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _replace(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
