"""Which tiers a home's KV lies in, fastest first, each with its rules."""

from __future__ import annotations

from kvrag.config import Settings
from kvrag.errors import MissingExtraError
from kvrag.store.disk import DiskTier
from kvrag.store.eviction import policy_named
from kvrag.store.ram import RamTier
from kvrag.store.redis import RedisTier
from kvrag.store.tiered import Limits, TierSlot

__all__ = ["tier_slots"]


def tier_slots(settings: Settings) -> list[TierSlot]:
    """Memory, the home's disk, and a Redis if there is one; close them, or their store.

    Raises:
        MissingExtraError: redis_url is set and redis-py is not installed.
        TierError: the home's disk cannot be used.
    """
    slots = [
        TierSlot(
            RamTier(),
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
            DiskTier(settings.home / "kv", fsync=settings.disk_fsync == "always"),
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
        slots.append(
            TierSlot(_redis(settings, settings.redis_url.get_secret_value()), settings.redis_bytes)
        )
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
