"""The tiers that a home's KV lies in, their rules, and what encrypts those outside of memory."""

from __future__ import annotations

from functools import partial

from kvrag.config import Settings
from kvrag.errors import MissingExtraError, SettingsError
from kvrag.home import Home
from kvrag.pinned import pinned_memory
from kvrag.store.disk import DiskTier
from kvrag.store.encryption_key import agree_on_key, key_from_text, read_key_file
from kvrag.store.eviction import policy_named
from kvrag.store.ram import RamTier
from kvrag.store.redis import RedisTier
from kvrag.store.sealed_tier import SealedTier
from kvrag.store.sealing import Sealer
from kvrag.store.tier import Tier
from kvrag.store.tiered import Limits, TierSlot

__all__ = ["open_disk", "open_redis", "open_sealer", "open_tier", "sealer_of", "tier_slots"]


def open_sealer(settings: Settings) -> Sealer | None:
    """What encrypts the home's KV, or None if that is off.

    Raises:
        MissingExtraError: a key is set and `cryptography` is not installed.
        EncryptionKeyError: it is no key, or not the one that the home was made with.
    """
    sealer = sealer_of(settings)
    agree_on_key(Home(settings.home).encryption_id, sealer.key_id if sealer is not None else "")
    return sealer


def sealer_of(settings: Settings) -> Sealer | None:
    """As `open_sealer`, without asking whether the key is the home's."""
    try:
        if settings.encryption_key is not None:
            return Sealer(key_from_text(settings.encryption_key.get_secret_value()))
        if settings.encryption_key_file is not None:
            return Sealer(read_key_file(settings.encryption_key_file))
    except ImportError as exc:
        raise MissingExtraError(
            "an encryption key is set, which needs cryptography: pip install 'kvrag[encryption]'"
        ) from exc
    return None


def tier_slots(settings: Settings, sealer: Sealer | None = None) -> list[TierSlot]:
    """Memory, the home's disk, and a Redis if there is one; close them, or their store.

    Without a `sealer`, sealed blocks are shown as they lie there: whoever only counts, checks or
    moves them needs no key.

    Raises:
        MissingExtraError: redis_url is set and redis-py is not installed.
        TierError: the home's disk cannot be used.
    """

    def outside(tier: Tier) -> Tier:
        return tier if sealer is None else SealedTier(tier, sealer)

    on_gpu = settings.device.startswith("cuda")
    pinned = partial(pinned_memory, device=settings.device)
    slots = [
        TierSlot(
            RamTier(allocate=pinned if on_gpu else None),
            Limits(
                settings.ram_bytes,
                namespace_nbytes=settings.namespace_ram_bytes,
                reserved_share=settings.ram_reserved,
                ttl_s=settings.ttl_s,
            ),
            policy=policy_named(settings.ram_policy),
            admission=settings.ram_admission,
        ),
        TierSlot(
            outside(open_tier(settings, "disk")),
            Limits(
                settings.disk_bytes,
                namespace_nbytes=settings.namespace_disk_bytes,
                ttl_s=settings.ttl_s,
            ),
            policy=policy_named(settings.disk_policy),
            admission=settings.disk_admission,
            write=settings.disk_write,
        ),
    ]
    if settings.redis_url is not None:
        limits = Limits(settings.redis_bytes, ttl_s=settings.ttl_s)
        redis = outside(open_tier(settings, "redis"))
        slots.append(TierSlot(redis, limits, write=settings.disk_write))
    return slots


def open_tier(settings: Settings, name: str) -> Tier:
    """The home's `disk`, or `redis`; as it lies there, sealed or not.

    Raises:
        SettingsError: redis is asked for, and redis_url is not set.
        MissingExtraError: redis-py is not installed.
        TierError: the home's disk cannot be used.
    """
    if name == "disk":
        return DiskTier(Home(settings.home).kv, fsync=settings.disk_fsync == "always")
    if settings.redis_url is None:
        raise SettingsError("redis is asked for, and setting 'redis_url' names none")
    return open_redis(settings, settings.redis_url.get_secret_value())


def open_disk(settings: Settings) -> Tier:
    """The home's disk, its blocks opened with the key of the settings if they have one.

    Raises:
        MissingExtraError, EncryptionKeyError: as `open_sealer`.
        TierError: the home's disk cannot be used.
    """
    sealer, disk = open_sealer(settings), open_tier(settings, "disk")
    return disk if sealer is None else SealedTier(disk, sealer)


def open_redis(settings: Settings, url: str, *, name: str = "redis") -> RedisTier:
    """The Redis that `url` names, used as the settings say.

    Raises:
        RedisUrlError: `url` names none; the message shows no secret.
        MissingExtraError: redis-py is not installed.
    """
    try:
        return RedisTier(
            url,
            name,
            prefix=settings.redis_prefix,
            # Redis ends by itself what no process knows of any more, of a corpus or not.
            ttl_s=settings.ttl_s if settings.redis_ttl_s is None else settings.redis_ttl_s,
            connect_timeout_s=settings.redis_connect_timeout_s,
            timeout_s=settings.redis_timeout_s,
            connections=settings.redis_connections,
        )
    except ImportError as exc:
        raise MissingExtraError(
            "a Redis is named, which needs redis-py: pip install 'kvrag[redis]'"
        ) from exc
