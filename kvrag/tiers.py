"""The tiers that a home's KV lies in, their rules, and what encrypts those outside of memory."""

from __future__ import annotations

from kvrag.config import Settings
from kvrag.errors import MissingExtraError
from kvrag.store.buffers import aligned_buffer
from kvrag.store.disk import DiskTier
from kvrag.store.encryption_key import agree_on_key, key_from_text, read_key_file
from kvrag.store.eviction import policy_named
from kvrag.store.ram import RamTier
from kvrag.store.redis import RedisTier
from kvrag.store.sealed_tier import SealedTier
from kvrag.store.sealing import Sealer
from kvrag.store.tier import Tier
from kvrag.store.tiered import Limits, TierSlot

__all__ = ["open_sealer", "tier_slots"]


def open_sealer(settings: Settings) -> Sealer | None:
    """What encrypts the home's KV, or None if that is off.

    Raises:
        MissingExtraError: a key is set and `cryptography` is not installed.
        EncryptionKeyError: it is no key, or not the one that the home was made with.
    """
    sealer = None
    try:
        if settings.encryption_key is not None:
            sealer = Sealer(key_from_text(settings.encryption_key.get_secret_value()))
        elif settings.encryption_key_file is not None:
            sealer = Sealer(read_key_file(settings.encryption_key_file))
    except ImportError as exc:
        raise MissingExtraError(
            "an encryption key is set, which needs cryptography: pip install 'kvrag[encryption]'"
        ) from exc
    agree_on_key(settings.home / "encryption.id", sealer.key_id if sealer is not None else "")
    return sealer


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

    slots = [
        TierSlot(
            RamTier(allocate=_pinned if settings.device.startswith("cuda") else None),
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
            outside(DiskTier(settings.home / "kv", fsync=settings.disk_fsync == "always")),
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
        redis = _redis(settings, settings.redis_url.get_secret_value())
        slots.append(TierSlot(outside(redis), settings.redis_bytes))
    return slots


def _redis(settings: Settings, url: str) -> RedisTier:
    try:
        return RedisTier(
            url,
            prefix=settings.redis_prefix,
            ttl_s=settings.redis_ttl_s,
            connect_timeout_s=settings.redis_connect_timeout_s,
            timeout_s=settings.redis_timeout_s,
            connections=settings.redis_connections,
        )
    except ImportError as exc:
        raise MissingExtraError(
            "redis_url is set, which needs redis-py: pip install 'kvrag[redis]'"
        ) from exc


def _pinned(nbytes: int) -> memoryview:
    """Memory that a GPU copies from by itself, at the start of a page as CUDA gives it.

    Ordinary memory where the system pins no more: such a block is staged as one from the disk is.
    """
    import torch

    try:
        memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return aligned_buffer(nbytes)
    data: memoryview = memory.numpy().data
    return data
