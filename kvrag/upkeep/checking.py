"""Reading every stored block anew, and computing again what a corpus lost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

from kvrag.config import Settings
from kvrag.engine import Engine
from kvrag.home import existing_home
from kvrag.store.errors import TierError
from kvrag.store.keys import BlockKey
from kvrag.store.maintenance import verify_blocks
from kvrag.store.tier import Tier
from kvrag.tiers import open_sealer, open_tier
from kvrag.upkeep.standing import Report, Standing

__all__ = ["Checked", "Damaged", "check_blocks"]


@dataclass(frozen=True, slots=True)
class Damaged:
    """A damaged copy, and whether a corpus of the home refers to its block."""

    tier: str
    key: BlockKey
    corpus: bool
    damage: str


@dataclass(slots=True)
class Checked:
    """What was found. `nbytes` of sound blocks; `unreachable`: why, by tier.

    missing: blocks of a corpus that are not on disk at all. lacking: those that are not there after
    the repair either.
    """

    blocks: int = 0
    nbytes: int = 0
    damaged: list[Damaged] = field(default_factory=list)
    missing: list[BlockKey] = field(default_factory=list)
    unreachable: dict[str, str] = field(default_factory=dict)
    repaired: int = 0
    lacking: list[BlockKey] = field(default_factory=list)


def check_blocks(settings: Settings, *, repair: bool, report: Report) -> Checked:
    """Read every block of all namespaces, on the home's disk and in the Redis of the settings.

    With `repair`, damaged copies are put aside (in Redis: deleted), and those blocks of a corpus
    that are then durable nowhere are computed again, which opens the model.

    Raises:
        SettingsError: there is no such home.
        EncryptionKeyError: with `repair`, the key is not the home's. Nothing was put aside then.
        TierError: its disk cannot be read. A Redis that fails is told of in the result.
    """
    home = existing_home(settings)
    if repair:
        open_sealer(settings)
    checked = Checked()
    referred = home.referred_keys() or set()
    with closing(open_tier(settings, "disk")) as disk:
        _check(disk, referred, checked, repair=repair, report=report)
        if settings.redis_url is not None:
            with closing(open_tier(settings, "redis")) as redis:
                try:
                    _check(redis, referred, checked, repair=repair, report=report)
                except TierError as exc:
                    checked.unreachable[redis.name] = exc.reason
        if not repair:
            return checked
        keys = dict.fromkeys(row.key for row in checked.damaged if row.corpus)
        lost = [key for key in keys if not disk.contains(key)] + checked.missing
    if lost:
        checked.lacking = _lacking(settings, lost)
    checked.repaired = len(checked.damaged) + len(checked.missing) - len(checked.lacking)
    return checked


def _check(
    tier: Tier, referred: set[BlockKey], checked: Checked, *, repair: bool, report: Report
) -> None:
    listed = list(tier.keys())
    # What stands in a block's place and is no file is not listed, and damage all the same.
    keys = list(dict.fromkeys([*listed, *sorted(referred)])) if tier.durable else listed
    seen: set[BlockKey] = set()
    for done, found in enumerate(verify_blocks(tier, keys, repair=repair), start=1):
        checked.blocks += 1
        seen.add(found.key)
        checked.nbytes += found.nbytes
        if found.damage is not None:
            corpus = found.key in referred
            checked.damaged.append(Damaged(tier.name, found.key, corpus, found.damage))
        report(Standing(f"blocks in {tier.name}", done, len(keys)))
    if tier.durable:
        checked.missing = [key for key in sorted(referred) if key not in seen]


def _lacking(settings: Settings, lost: Sequence[BlockKey]) -> list[BlockKey]:
    """Compute what the corpus lacks; the keys that this model and namespace do not give."""
    with Engine.open(settings) as engine:
        engine.complete()
        return [key for key in lost if not engine.store.holds_durably(key)]
