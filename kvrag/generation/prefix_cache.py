"""Exact KV of prompt prefixes, kept in memory between requests."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from kvrag.generation.kv_cache import KVCache
from kvrag.models.decoder import Decoder
from kvrag.models.forward import append

__all__ = ["PrefixCache"]


class PrefixCache:
    """The KV of the last few prefixes (system text of a prompt), by their token ids. Thread-safe.

    A prefix is always computed alone, so that its KV is the same bit for bit whoever computes it.
    """

    def __init__(self, decoder: Decoder, limit: int = 8) -> None:
        self._decoder, self._limit = decoder, limit
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = OrderedDict()

    def fill(self, cache: KVCache, prefix_ids: Sequence[int]) -> bool:
        """Put the prefix into the empty `cache`; whether it was there already."""
        key = tuple(prefix_ids)
        with self._lock:
            if (entry := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
        if entry is None:
            append(self._decoder, key, cache)
            self._keep(key, cache)
            return False
        cache.reserve(len(key))
        for layer, (k, v) in enumerate(entry):
            cache.write(layer, slice(0, len(key)), k, v)
        cache.length = len(key)
        return True

    def _keep(self, key: tuple[int, ...], cache: KVCache) -> None:
        n = len(key)
        entry = [
            (k[:, :n].clone(), v[:, :n].clone()) for k, v in zip(cache.k, cache.v, strict=True)
        ]
        with self._lock:
            self._entries[key] = entry
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
