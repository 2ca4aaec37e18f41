"""A home: which thing lies in it under which name, and what its corpora refer to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvrag.config import Settings
from kvrag.errors import SettingsError
from kvrag.retrieval.catalog import Catalog
from kvrag.store.keys import BlockKey

__all__ = ["Home", "existing_home"]


@dataclass(frozen=True, slots=True)
class Home:
    """Names in one folder. Touches nothing but where a method says so."""

    path: Path

    @property
    def secret(self) -> Path:
        """The key secret. A folder that has one is a home."""
        return self.path / "key.secret"

    @property
    def encryption_id(self) -> Path:
        """Tells which encryption key the home was made with; absent if it has none."""
        return self.path / "encryption.id"

    @property
    def catalog(self) -> Path:
        return self.path / "catalog.sqlite"

    @property
    def index(self) -> Path:
        """The folder of vector indexes."""
        return self.path / "index"

    def corpus_index(self, namespace: str) -> Path:
        """The folder of a namespace's indexes: its bytes in hex, so that none names a path."""
        return self.index / namespace.encode().hex()

    @property
    def kv(self) -> Path:
        """The folder of the disk tier."""
        return self.path / "kv"

    @property
    def claims(self) -> Path:
        """Tells processes on one home which blocks others are computing. Empty."""
        return self.path / "computing.lock"

    def job_lock(self, namespace: str, shard: str) -> Path:
        """What a job on a corpus holds, so that a second one waits."""
        name = f"{namespace.encode().hex()}-{shard.replace('/', '-of-')}.lock"
        return self.path / "jobs" / name

    def job_locks(self, namespace: str) -> list[Path]:
        """What all jobs on a corpus hold or held, of every shard."""
        known = (self.path / "jobs").glob(f"{namespace.encode().hex()}-*.lock")
        return sorted({self.job_lock(namespace, "1/1"), *known})

    @property
    def import_lock(self) -> Path:
        """What an import holds: its blocks are nobody's until its documents are there."""
        return self.path / "jobs" / "import.lock"

    def referred_keys(self) -> set[BlockKey] | None:
        """Blocks that a corpus of the home refers to; None without a catalog."""
        if not self.catalog.is_file():
            return None
        with Catalog.open(self.catalog) as catalog:
            return {BlockKey.parse(key) for key in catalog.block_keys()}


def existing_home(settings: Settings) -> Home:
    """The home of the settings. Raises SettingsError if there is none: looking makes none."""
    if not settings.home.is_dir():
        raise SettingsError(f"home {settings.home} does not exist; `kvrag precompute` makes it")
    return Home(settings.home)
