"""Copying a corpus under another codec: blocks encoded anew, and what finds them.

A block's key binds its codec, so every block gets a new key, and the catalog new references. Which
key that is depends on namespace, model and corpus prefix, of which a block shows a hash alone: the
engine that would look for it under the new codec says what it looks for, and a block is known by
the key that this gives under its own codec. What no such key fits is of another model, namespace or
prefix, and is left out.

The catalog comes from a home: from the source, whose catalog and vector index a target home gets as
they are but for the references, or else from the target.
"""

from __future__ import annotations

import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kvrag.blocks import ChunkBlocks
from kvrag.config import Settings
from kvrag.engine import Engine
from kvrag.errors import InputError, SettingsError
from kvrag.home import Home
from kvrag.retrieval.catalog import Catalog
from kvrag.store.encryption_key import agree_on_key
from kvrag.store.errors import BlockFormatError, UnencodableError
from kvrag.store.files import link_once, make_folders
from kvrag.store.header import BlockHeader
from kvrag.store.keys import BlockKey, KeyMaker
from kvrag.store.maintenance import Copied, read_settled
from kvrag.store.sealed_tier import SealedTier
from kvrag.store.sealing import Sealer, is_sealed
from kvrag.store.secret import load_or_create_secret
from kvrag.store.tier import Tier
from kvrag.tiers import sealer_of
from kvrag.upkeep.copying import Copying, Warn, check_same, copy_secret, counted
from kvrag.upkeep.place import Place
from kvrag.upkeep.standing import Report, Standing

__all__ = ["recode_place"]

_BATCH = 128


def recode_place(
    source: Place, target: Place, settings: Settings, *, report: Report, warn: Warn
) -> Copying:
    """Copy the blocks of the settings' model, of all namespaces, encoded by the settings' codec.

    Into a home go the catalog and the vector index, too, so that an engine on it with that codec
    answers from what was copied. With an encryption key in the settings, blocks are opened with it
    and sealed again; those of a home that is not encrypted are sealed.

    Raises:
        InputError: neither place is a home, or there is nothing that lost no bits.
        SettingsError: the target is a home of another secret or of another catalog.
        EncryptionKeyError: the key is not that of the blocks.
        TierError: a place fails.
        ModelError: see `Engine.open`.
    """
    home = target.home or source.home
    if home is None:
        raise InputError(
            "--codec makes new keys, for which a key secret and a catalog are needed: of FROM and "
            "TO at least one must be a home"
        )
    catalog_home = source.home or home
    if not catalog_home.catalog.is_file():
        raise InputError(f"home {catalog_home.path} has no catalog; `kvrag precompute` makes it")
    opened_by, sealed_by = _sealers(source, target, settings)
    with ExitStack() as stack:
        one = stack.enter_context(_opened(source, settings, opened_by))
        keys = list(one.keys())
        _check_codecs(source, one, keys, settings.codec, report)
        if source.home is not None and target.home is not None:
            check_same(source.home.secret, target.home.secret, "a key secret")
            copy_secret(source.home, target.home)
            _copy_catalog(source.home, target.home)
            _copy_index(source.home.index, target.home.index)
        kinds = _kinds(home, settings)
        origin = stack.enter_context(Catalog.open(catalog_home.catalog))
        catalog = None
        if target.home is not None:
            catalog = stack.enter_context(Catalog.open(target.home.catalog))
        other = stack.enter_context(_opened(target, settings, sealed_by))
        secret = load_or_create_secret(home.secret)
        made_with = KeyMaker(secret, sealed_by=opened_by.key_id if opened_by is not None else "")
        recoder = _Recoder(one, other, kinds, made_with, origin, catalog)
        return counted(recoder.blocks(keys), len(keys), report, warn)


@dataclass(frozen=True, slots=True)
class _Recoder:
    """Encodes blocks of `source` anew into `target`.

    made_with: the source's keys. origin: says which chunks refer to a block of the source.
    catalog: that of the target, if it has one.
    """

    source: Tier
    target: Tier
    kinds: Sequence[ChunkBlocks]
    made_with: KeyMaker
    origin: Catalog
    catalog: Catalog | None

    def blocks(self, keys: Sequence[BlockKey]) -> Iterator[Copied]:
        rounded: list[tuple[BlockHeader, BlockKey]] = []
        for key in keys:
            try:
                header = self.source.header(key)
                if header is None:
                    if self.source.contains(key):
                        why = "it is sealed with another key, or not at all"
                        yield Copied(key, 0, "left_out", why)
                    continue
                kind = next((k for k in self.kinds if k.owns(header, self.made_with)), None)
                if kind is None:
                    why = "it is of another model, namespace, corpus prefix or kind"
                    yield Copied(key, 0, "left_out", why)
                elif kind.can_recode(header):
                    copied = self._block(header, kind)
                    if copied is not None:
                        yield copied
                else:
                    rounded.append((header, kind.key(header.token_ids)))
            except BlockFormatError as exc:
                yield Copied(key, 0, "damaged", str(exc))
            except UnencodableError as exc:
                yield Copied(key, 0, "left_out", str(exc))
        for header, key in rounded:
            # Its chunk may have another block, of which nothing was lost.
            found = self._found(key)
            if found is not None:
                yield Copied(header.key, found.nbytes, "present")
            else:
                why = f"{header.codec} has rounded it, and there is none that it has not"
                yield Copied(header.key, 0, "left_out", why)

    def _block(self, header: BlockHeader, kind: ChunkBlocks) -> Copied | None:
        key = kind.key(header.token_ids)
        # The reference comes first, as for a block that is computed.
        if self.catalog is not None:
            for chunk_id in self.origin.block_chunks(str(header.key)):
                self.catalog.add_block_ref(str(key), chunk_id, kind.scope)
        found = self._found(key)
        if found is not None and found.token_ids == header.token_ids and kind.can_recode(found):
            return Copied(key, found.nbytes, "present")
        block = read_settled(self.source, header.key)
        if block is None:
            return None
        recoded = kind.recoded(block)
        self.target.put(key, recoded)
        return Copied(key, recoded.nbytes, "copied")

    def _found(self, key: BlockKey) -> BlockHeader | None:
        try:
            return self.target.header(key)
        except BlockFormatError:
            return None


def _kinds(home: Home, settings: Settings) -> list[ChunkBlocks]:
    """What an engine on that home looks for under the settings' codec, in every namespace."""
    with Catalog.open(home.catalog) as catalog:
        namespaces = sorted({*catalog.namespaces(), settings.namespace})
    kinds: list[ChunkBlocks] = []
    model = None
    for namespace in namespaces:
        inside = {"home": home.path, "namespace": namespace, "redis_url": None, "ram_bytes": 0}
        with Engine(settings.model_copy(update=inside), model=model) as engine:
            model = engine.model
            kinds += engine.block_kinds()
    return kinds


def _check_codecs(
    source: Place, tier: Tier, keys: Sequence[BlockKey], codec: str, report: Report
) -> None:
    """Refuse, before anything is made, what holds only blocks that cannot be encoded anew."""
    codecs: Counter[str] = Counter()
    sealed = False
    for start in range(0, len(keys), _BATCH):
        for header in tier.headers(keys[start : start + _BATCH]):
            if isinstance(header, BlockHeader) and header.kind == "chunk":
                codecs[header.codec] += 1
                sealed |= is_sealed(header)
        report(Standing("headers", min(start + _BATCH, len(keys)), len(keys)))
    if not codecs or codecs.keys() & {"raw", codec}:
        return
    held = ", ".join(f"{count} of {name}" for name, count in codecs.most_common())
    if sealed:
        raise SettingsError(f"{source} holds sealed blocks ({held}): set their encryption key")
    raise InputError(
        f"{source} holds {held} and no raw blocks; what one codec has rounded must not pass for "
        f"{codec}. Without --codec blocks are copied as they are"
    )


# ---- what goes along -----------------------------------------------------------------------------


def _copy_catalog(source: Home, target: Home) -> None:
    """The source's catalog as it is now, but for references to blocks, unless it is there."""
    if target.catalog.exists():
        with Catalog.open(source.catalog) as mine, Catalog.open(target.catalog) as theirs:
            same = mine.identity == theirs.identity and mine.generations() == theirs.generations()
        if not same:
            raise SettingsError(
                f"{target.path} has a catalog that is not, or is no longer, that of {source.path}: "
                "copy to a folder that is not there yet"
            )
        return
    temporary = _temporary(target.catalog)
    try:
        with Catalog.open(source.catalog) as catalog:
            catalog.write_copy(temporary)
        link_once(temporary, target.catalog)
    finally:
        temporary.unlink(missing_ok=True)


def _copy_index(source: Path, target: Path) -> None:
    """Vector indexes, of which those that do not fit the catalog are made again by who opens it."""
    # A sidecar comes behind its index by name, and is what makes it valid.
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.name.startswith(".") or not path.is_file() or place.exists():
            continue
        temporary = _temporary(place)
        try:
            make_folders(place.parent)
            shutil.copyfile(path, temporary)
            link_once(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


# ---- encryption ----------------------------------------------------------------------------------


def _sealers(
    source: Place, target: Place, settings: Settings
) -> tuple[Sealer | None, Sealer | None]:
    """What opens the source's blocks, and what seals the target's. Makes nothing."""
    sealer = sealer_of(settings)
    key_id = sealer.key_id if sealer is not None else ""
    opened_by = sealer
    for home in (source.home, target.home):
        if home is not None and home.encryption_id.exists():
            agree_on_key(home.encryption_id, key_id)
    if source.home is not None and not source.home.encryption_id.exists():
        opened_by = None
        if target.home is None and sealer is not None:
            raise SettingsError(
                f"an encryption key is set, and {source} is not encrypted: an engine on it would "
                f"not find sealed blocks in {target}"
            )
    return opened_by, sealer


def _opened(place: Place, settings: Settings, sealer: Sealer | None) -> Tier:
    tier = place.open(settings)
    return tier if sealer is None else SealedTier(tier, sealer)
