"""What a tier of the store costs above the library under it.

redis: a block's layers from `RedisTier` against a bare redis-py loop that fetches the same fields
of the same key, in groups of layers as a query reads them. They take turns, so that a busy machine
slows both. Above the loop the tier looks up what it knows of the block, fetches 16 bytes that tell
whether that still holds, and checks each layer's length. Checksums are the reader's, for any tier.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvrag.bench.frame import median, show
from kvrag.config import Settings
from kvrag.errors import InputError, MissingExtraError
from kvrag.store.block import Block, encode_block
from kvrag.store.keys import BlockKey
from kvrag.store.redis import RedisTier
from kvrag.store.redis_address import RedisAddress

__all__ = ["StoreOptions", "run"]

#: Layers of a stream's largest read.
_LARGEST = 8


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Layers a block, bytes a layer, blocks, and how often each is read by each contestant."""

    layers: int = 30
    layer_nbytes: int = 196_608
    blocks: int = 4
    repetitions: int = 20


def run(settings: Settings, options: StoreOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON).

    Keys are written under a prefix of this run alone, and deleted at its end.

    Raises:
        InputError: no `redis_url`, or one of Sentinel or a cluster, where no bare loop reads.
        MissingExtraError: redis-py is not installed.
        TierError: Redis does not answer.
    """
    if settings.redis_url is None:
        raise InputError("the setting redis_url (KVRAG_REDIS_URL) names no Redis to measure")
    url = settings.redis_url.get_secret_value()
    address = RedisAddress.parse(url)
    if address.kind not in ("single", "unix"):
        raise InputError(f"{address} is not one server; measure redis://, rediss:// or unix://")
    result: dict[str, Any] = {"benchmark": "store", "redis": _redis(url, settings, options)}
    found = result["redis"]
    show(
        f"{options.layers} layers of {options.layer_nbytes} bytes from {address}",
        ("reader", "ms a block", "GB/s", "of the bare loop"),
        [
            (name, found["ms"][name], found["gb_s"][name], f"{found['of_bare'][name]:.0%}")
            for name in found["ms"]
        ],
        result,
    )
    return result


def _redis(url: str, settings: Settings, options: StoreOptions) -> dict[str, Any]:
    try:
        import redis
    except ImportError as exc:
        raise MissingExtraError("the benchmark needs redis-py: pip install 'kvrag[redis]'") from exc
    prefix = f"kvrag-bench-{secrets.token_hex(8)}:"
    blocks = [_block(options) for _ in range(options.blocks)]
    tier = RedisTier(
        url,
        prefix=prefix,
        ttl_s=3600,
        connect_timeout_s=settings.redis_connect_timeout_s,
        timeout_s=settings.redis_timeout_s,
    )
    with tier, redis.Redis.from_url(url) as client:
        try:
            for block in blocks:
                tier.put(block.header.key, block)
            contestants: dict[str, Callable[[BlockKey], list[Any]]] = {
                "bare": partial(_bare, client, prefix, options.layers),
                "tier": partial(_tier, tier, options.layers),
            }
            ms = _milliseconds(contestants, blocks, options.repetitions)
        finally:
            for block in blocks:
                tier.delete(block.header.key)
    nbytes = options.layers * options.layer_nbytes
    return {
        "layers": options.layers,
        "layer_bytes": options.layer_nbytes,
        "blocks": options.blocks,
        "repetitions": options.repetitions,
        "redis_py": redis.__version__,
        "ms": {name: median([taken]) for name, taken in ms.items()},
        "gb_s": {name: median([nbytes / taken / 1e6]) for name, taken in ms.items()},
        "of_bare": {name: median([ms["bare"] / taken]) for name, taken in ms.items()},
    }


def _milliseconds(
    contestants: dict[str, Callable[[BlockKey], list[Any]]], blocks: list[Block], repetitions: int
) -> dict[str, float]:
    """Of one block, the median; what each contestant brings is compared with what was put."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repetitions + 1):
        for block in blocks:
            # Who comes second finds the block in caches: they change places.
            names = list(contestants) if turn % 2 else list(reversed(contestants))
            for name in names:
                begun = time.perf_counter()
                brought = contestants[name](block.header.key)
                taken = time.perf_counter() - begun
                if turn:  # the first one connects
                    seconds[name].append(taken)
                elif brought != list(block.segments):
                    raise RuntimeError(f"{name} brought other bytes than were put")
    return {name: median(taken) * 1e3 for name, taken in seconds.items()}


def _tier(tier: RedisTier, layers: int, key: BlockKey) -> list[Any]:
    brought: list[Any] = []
    for first, last in _groups(layers):
        brought += tier.segments(key, first, last) or ()
    return brought


def _bare(client: Any, prefix: str, layers: int, key: BlockKey) -> list[Any]:
    brought: list[Any] = []
    for first, last in _groups(layers):
        brought += client.hmget(f"{prefix}{key}", range(first, last))
    return brought


def _groups(layers: int) -> Iterator[tuple[int, int]]:
    """The reads of a stream: 1, 2, 4, 8, 8, … layers."""
    first = 0
    while first < layers:
        last = min(layers, first + min(first + 1, _LARGEST))
        yield first, last
        first = last


def _block(options: StoreOptions) -> Block:
    tokens = 1
    return encode_block(
        key=BlockKey(secrets.token_hex(16), secrets.token_hex(32)),
        kind="chunk",
        fingerprint="benchmark",
        token_ids=(0,),
        k_shape=(options.layers, 1, tokens, 1),
        v_shape=(options.layers, 1, tokens, 1),
        dtype="bfloat16",
        codec="raw",
        codec_version=1,
        codec_digest="",
        segments=[secrets.token_bytes(options.layer_nbytes) for _ in range(options.layers)],
    )
