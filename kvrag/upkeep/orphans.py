"""Blocks that nobody needs any more, in every tier that outlives the process."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from kvrag.config import Settings
from kvrag.errors import SettingsError
from kvrag.home import Home
from kvrag.retrieval.catalog import Catalog
from kvrag.store.encryption_key import read_key_id
from kvrag.store.errors import TierError
from kvrag.store.header import BlockHeader
from kvrag.store.keys import BlockKey, KeyMaker
from kvrag.store.sealing import is_sealed
from kvrag.store.secret import load_or_create_secret
from kvrag.store.tier import StoredBlock, Tier
from kvrag.tiers import open_sealer, tier_slots

__all__ = ["Orphans", "collect_orphans"]

_BATCH = 128


@dataclass(frozen=True, slots=True)
class Orphans:
    """What was found, and deleted if that was wanted.

    `tiers`: the blocks in each tier that was asked, by its name; one may lie in several. `failed`:
    why others could not be asked, or not to the end, in a sentence, by name.
    """

    tiers: dict[str, list[StoredBlock]]
    failed: dict[str, str]

    @property
    def blocks(self) -> int:
        """How many different ones."""
        return len({entry.key for found in self.tiers.values() for entry in found})

    @property
    def nbytes(self) -> int:
        """Of all copies."""
        return sum(entry.nbytes for found in self.tiers.values() for entry in found)


def collect_orphans(settings: Settings, *, unused_s: float = 0.0, delete: bool) -> Orphans:
    """Find, and delete if `delete` says so, what no corpus of the home refers to, in all tiers.

    Of all namespaces that the home ever had. On its disk all blocks are the home's; elsewhere it
    knows its own by their tags. In a home with an encryption key also what lies there in clear or
    under another key, referred to or not: no name leads there any more. What was used within
    `unused_s` seconds, as far as the tier remembers, stays. Needs no key. Others may use the home
    meanwhile.

    Raises:
        SettingsError: there is no home, or none with a catalog.
        TierError: the home's disk cannot be used; that another tier cannot is told in the result.
        EncryptionKeyError: a key is given, and it is not the home's.
        MissingExtraError: as `tier_slots`.
    """
    home = Home(settings.home)
    if not home.catalog.is_file():
        raise SettingsError(
            f"home {home.path} has no catalog, so nobody knows what its corpus refers to; if there "
            f"is none, delete {home.kv}"
        )
    if settings.encryption_key is not None or settings.encryption_key_file is not None:
        open_sealer(settings)  # one that is not the home's decides nothing here
    result = Orphans({}, {})
    with ExitStack() as stack:
        tiers = [stack.enter_context(slot.tier) for slot in tier_slots(settings)]
        listed: list[tuple[Tier, list[StoredBlock]]] = []
        for tier in tiers:
            with _told(tier, result):
                if not tier.in_process:
                    # Before the catalog is read: a job refers to a block before it writes it.
                    listed.append((tier, tier.entries()))
        referred, tags = _of_the_home(home)
        sealed_by = read_key_id(home.encryption_id)
        for tier, entries in listed:
            mine = [
                entry
                for entry in entries
                if entry.idle_s >= unused_s and (tier.durable or entry.key.tag in tags)
            ]
            with _told(tier, result):
                useless = set(_not_sealed(tier, referred, mine, sealed_by)) if sealed_by else ()
                found = [e for e in mine if e.key not in referred or e.key in useless]
                if delete:
                    tier.delete_many([entry.key for entry in found])
                    if tier.durable:
                        _forget(home, useless)
                result.tiers[tier.name] = found
    return result


@contextmanager
def _told(tier: Tier, result: Orphans) -> Iterator[None]:
    """What befalls a tier that is counted on for nothing is told in the result."""
    try:
        yield
    except TierError as exc:
        if tier.durable:
            raise
        result.failed[tier.name] = exc.reason


def _not_sealed(
    tier: Tier, referred: Container[BlockKey], entries: Iterable[StoredBlock], sealed_by: str
) -> Iterator[BlockKey]:
    """Of the blocks that are referred to, those that are not sealed with that key."""
    keys = [entry.key for entry in entries if entry.key in referred]
    for start in range(0, len(keys), _BATCH):
        some = keys[start : start + _BATCH]
        for key, header in zip(some, tier.headers(some), strict=True):
            # What is damaged is left to who verifies.
            if isinstance(header, BlockHeader) and not (
                is_sealed(header) and header.codec_digest == sealed_by
            ):
                yield key


def _forget(home: Home, keys: Iterable[BlockKey]) -> None:
    """Take back the references to blocks that no name leads to any more."""
    with Catalog.open(home.catalog) as catalog:
        for key in keys:
            catalog.forget_block(str(key))


def _of_the_home(home: Home) -> tuple[set[BlockKey], set[str]]:
    """The blocks that its corpora refer to, and the tags of its namespaces."""
    with Catalog.open(home.catalog) as catalog:
        referred = {BlockKey.parse(name) for name in catalog.block_keys()}
        namespaces = catalog.seen_namespaces()
    if not home.secret.is_file():
        return referred, set()
    keys = KeyMaker(load_or_create_secret(home.secret))
    return referred, {keys.tag(namespace) for namespace in namespaces}
