"""One worker of a job: opens what a chunk's KV takes, and makes the blocks that it is given.

It knows the home's folder, of which it reads the key secret and writes the disk tier, and never its
catalog: SQLite is for the machine that runs the job. Nothing that is secret is sent to it: what the
job's settings hold of that a worker has to find in its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from kvrag.blocks import ChunkBlocks, SingleFlight
from kvrag.config import Settings
from kvrag.errors import SettingsError
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.home import Home
from kvrag.opened_model import opened_model
from kvrag.precompute.elsewhere import Report
from kvrag.precompute.making import Effort, Maker, StorageFullError, Wanted
from kvrag.store.claims import Claims
from kvrag.store.codecs import codec
from kvrag.store.keys import BlockKey, KeyMaker, packed
from kvrag.store.secret import load_or_create_secret
from kvrag.store.tiered import TieredStore
from kvrag.tiers import open_sealer, tier_slots

__all__ = ["Recipe", "Worker"]

#: Blocks in hand: one is computed while the other is stored.
_IN_HAND = 2
#: Not sent.
_SECRET = ("redis_url", "encryption_key")
#: A machine's own, unless somebody set them.
_LOCAL = ("models_dir", "kernels_dir")


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a worker has to be told, and nothing secret.

    values: settings. secrets: names of those that it has to have of its own. fine: channels of a
    calibrated codec. prefixes: what blocks are computed behind. scopes: of the blocks behind each
    prefix, which have to come out the same there.
    """

    values: dict[str, Any]
    secrets: tuple[str, ...]
    fine: Sequence[Sequence[Sequence[int]]]
    prefixes: tuple[tuple[int, ...], ...]
    scopes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        settings: Settings,
        kinds: Sequence[ChunkBlocks],
        fine: Sequence[Sequence[Sequence[int]]],
    ) -> Recipe:
        """For `kinds` of blocks under these settings."""
        unsent = {*_SECRET, *(name for name in _LOCAL if name not in settings.model_fields_set)}
        values = settings.model_dump(exclude=unsent) | {
            # Memory is no use to who reads nothing.
            "ram_bytes": 0,
            # A worker does not know what a corpus refers to, so nothing is too old for it.
            "ttl_s": None,
            "redis_ttl_s": settings.redis_ttl_s or settings.ttl_s,
            # Whatever device a worker is given, it is the first that it sees.
            "device": settings.device.partition(":")[0],
        }
        return cls(
            values,
            tuple(name for name in _SECRET if getattr(settings, name) is not None),
            fine,
            tuple(blocks.prefix_ids for blocks in kinds),
            tuple(blocks.scope for blocks in kinds),
        )

    def settings(self) -> Settings:
        """The settings where the worker is. Raises SettingsError for a secret that is not there."""
        settings = Settings(**self.values)
        for name in self.secrets:
            if getattr(settings, name) is None:
                raise SettingsError(
                    f"setting {name!r} is set for the job and not for its worker: secrets are not "
                    f"sent, set KVRAG_{name.upper()} where the worker's machine joins the cluster"
                )
        return settings


class Worker:
    """Model, codec and tiers in a worker's process. Close it.

    Evicts nothing: what the limits of the home leave no room for is refused.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Raises SettingsError if blocks made here would not be those that the job wants."""
        settings = recipe.settings()
        home = Home(settings.home)
        if not home.secret.is_file():
            raise SettingsError(
                f"home {home.path} is not there for a worker: it has to be one folder, which all "
                "machines of the cluster share"
            )
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        model = opened_model(settings)
        sealer = open_sealer(settings)
        keys = KeyMaker(
            load_or_create_secret(home.secret), sealed_by="" if sealer is None else sealer.key_id
        )
        self._store = TieredStore(tier_slots(settings, sealer))
        self._flights = SingleFlight(Claims(home.claims))
        prefixes = PrefixCache(model.decoder)
        kinds = [
            ChunkBlocks(
                model,
                self._store,
                keys,
                codec(settings.codec, fine=recipe.fine),
                prefixes,
                namespace=settings.namespace,
                prefix_ids=prefix_ids,
                flights=self._flights,
            )
            for prefix_ids in recipe.prefixes
        ]
        self._kinds = {blocks.scope: blocks for blocks in kinds}
        if tuple(self._kinds) != recipe.scopes:
            self.close()
            raise SettingsError(
                "a worker has other weights, or another tokenizer, home or encryption key, than "
                f"the job: its model {settings.model!r} is {model.fingerprint}"
            )
        limits = (settings.disk_bytes, settings.namespace_disk_bytes, settings.redis_bytes)
        if any(limit is not None for limit in limits):
            self._store.protect(self._store.keys())
        self._maker = Maker(self._store.holds_durably)
        self._threads = ThreadPoolExecutor(_IN_HAND, "kvrag-chunk")

    def make(self, asked: Sequence[tuple[int, str, Sequence[int]]]) -> list[Report]:
        """Blocks of chunks: (chunk id, scope, token ids). In order."""
        wanted = [
            Wanted(chunk_id, self._kinds[scope], tuple(ids)) for chunk_id, scope, ids in asked
        ]
        return list(self._threads.map(self._report, wanted))

    def close(self) -> None:
        self._store.close()
        self._flights.close()

    def _report(self, wanted: Wanted) -> Report:
        key: BlockKey = wanted.key
        effort, refused = Effort(), ""
        # Who had this to do before may have been killed behind it.
        if not self._store.holds_durably(key):
            self._store.protect([key])
            try:
                effort = self._maker.make(wanted)
            except StorageFullError as exc:
                refused = str(exc)
        return Report(packed(key), effort, refused)
