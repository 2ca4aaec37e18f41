"""Stored K and V on the device that computes: copies beside the computing, and a cache of them."""

from kvrag.fusion.device.cache import DeviceCache, DeviceStats
from kvrag.fusion.device.copies import DeviceCopies
from kvrag.fusion.device.loading import DeviceLoading, HeldChunks

__all__ = ["DeviceCache", "DeviceCopies", "DeviceLoading", "DeviceStats", "HeldChunks"]
