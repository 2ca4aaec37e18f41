"""The tiers that the settings name, fastest first, each with its rules."""

from __future__ import annotations

from kvrag.config import Settings
from kvrag.store.disk import DiskTier
from kvrag.store.eviction import policy_named
from kvrag.store.ram import RamTier
from kvrag.store.tiered import Limits, TierSlot

__all__ = ["tier_slots"]


def tier_slots(settings: Settings) -> list[TierSlot]:
    """Opens the tiers; close them, or the store that takes them. Raises `TierError`."""
    return [
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
