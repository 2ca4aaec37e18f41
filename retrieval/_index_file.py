"""The index on disk: FAISS's own file, and a JSON sidecar that says what it belongs to.

The sidecar is written last and holds the file's checksum: whatever a crash, or two processes that
save at once, leave behind, the two either match or the index is rebuilt.
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

from xxhash import xxh3_64

_BLOCK_BYTES = 1 << 20
_SIDECAR_BYTES = 64 << 10
_FORMAT = 1
_ABANDONED_S = 3600.0


@dataclass(frozen=True, slots=True)
class IndexIdentity:
    """What an index file must have been made from to be of use."""

    catalog: str
    namespace: str
    embedder: str
    dim: int
    generation: int


def read_index(faiss: Any, path: Path, expected: IndexIdentity, log: logging.Logger) -> Any | None:
    """The FAISS index at `path`, or None if it is absent or not to be trusted (logged)."""
    try:
        with _sidecar(path).open("rb") as file:
            sidecar = json.loads(file.read(_SIDECAR_BYTES))
        if sidecar.get("format") != _FORMAT or sidecar.get("identity") != asdict(expected):
            log.info("the index %s is of another state of the catalog; rebuilding it", path)
            return None
        if sidecar.get("xxh3_64") != _checksum(path):
            log.warning("the index %s is damaged; rebuilding it", path)
            return None
        index = faiss.read_index(str(path))
    except FileNotFoundError:
        log.info("there is no index at %s; building it", path)
        return None
    except (OSError, ValueError, AttributeError, RecursionError, RuntimeError) as exc:
        log.warning("the index %s cannot be read (%s); rebuilding it", path, exc)
        return None
    # Kinds are compared, not trusted: the checksum tells damage, not who wrote the file.
    if not isinstance(index, faiss.IndexIDMap2) or index.d != expected.dim:
        log.warning("the index %s is of another kind; rebuilding it", path)
        return None
    return index


def write_index(
    faiss: Any, index: Any, path: Path, identity: IndexIdentity, log: logging.Logger
) -> bool:
    """Write index and sidecar, each by temporary file, fsync and replace; False if that failed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        faiss.write_index(index, str(temporary))
        checksum = _checksum(temporary)
        _replace(temporary, path)
        sidecar = {"format": _FORMAT, "identity": asdict(identity), "xxh3_64": checksum}
        temporary.write_text(json.dumps(sidecar), encoding="utf-8")
        _replace(temporary, _sidecar(path))
    except (OSError, RuntimeError) as exc:  # FAISS reports a full disk as RuntimeError
        log.warning("the index %s was not saved: %s", path, exc)
        with suppress(OSError):
            temporary.unlink()
        return False
    return True


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


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


def _remove_abandoned(path: Path) -> None:
    """Temporary files of a save that was killed; young ones may be another process's work."""
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
            leftover.unlink(missing_ok=True)
