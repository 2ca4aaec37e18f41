"""Whether the time of a look-up tells a tenant that another one's text is stored.

One tenant stores texts. Another one looks up some of them, and as many that nobody stored, in
random order. Who is shown one time of each kind, and has to say which is which, is right in
0.5 + `advantage` of all cases: 0 is a coin. Looking up one's own texts is measured in turns with
the rest: what the measurement can see when there is something to be seen.
"""

from __future__ import annotations

import math
import random
import secrets
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from kvrag.bench.frame import median, show
from kvrag.store.block import encode_block
from kvrag.store.disk import DiskTier
from kvrag.store.keys import BlockKey, KeyMaker
from kvrag.store.ram import RamTier
from kvrag.store.tiered import TieredStore, TierSlot

__all__ = ["TenantsOptions", "advantage", "run"]

_FINGERPRINT = "bench"
_KINDS = ("another's", "nobody's", "own")


@dataclass(frozen=True, slots=True)
class TenantsOptions:
    """Texts of each kind, tokens of a text, look-ups of each text, and the seed of their order."""

    texts: int = 200
    tokens: int = 64
    repetitions: int = 20
    seed: int = 0


def run(options: TenantsOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON)."""
    rng = random.Random(options.seed)
    texts = {
        kind: [
            tuple(rng.randrange(50_000) for _ in range(options.tokens))
            for _ in range(options.texts)
        ]
        for kind in _KINDS
    }
    keys = KeyMaker(secrets.token_bytes(32))
    with (
        tempfile.TemporaryDirectory(prefix="kvrag-bench-") as folder,
        TieredStore([TierSlot(RamTier()), TierSlot(DiskTier(Path(folder) / "kv"))]) as store,
    ):
        for namespace, kind in (("other", "another's"), ("mine", "own")):
            for ids in texts[kind]:
                _store(store, _key(keys, namespace, ids), ids)
        asked = [(kind, ids) for kind in _KINDS for ids in texts[kind]] * options.repetitions
        rng.shuffle(asked)
        times: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        for kind, ids in asked:
            started = time.perf_counter_ns()
            reader = store.open(_key(keys, "mine", ids), fingerprint=_FINGERPRINT, token_ids=ids)
            times[kind].append((time.perf_counter_ns() - started) / 1000)
            if (reader is not None) != (kind == "own"):
                raise RuntimeError(f"a look-up of {kind} text was answered wrongly")
            if reader is not None:
                reader.close()
    seen = {kind: advantage(times[kind], times["nobody's"]) for kind in ("another's", "own")}
    result = {
        "benchmark": "tenants",
        "texts": options.texts,
        "tokens": options.tokens,
        "repetitions": options.repetitions,
        "median_us": {kind: median(taken) for kind, taken in times.items()},
        "advantage": {kind: round(value, 4) for kind, value in seen.items()},
        # Two standard deviations of what chance alone gives.
        "advantage_by_chance": round(2 * _chance(options.texts * options.repetitions), 4),
    }
    rows = [
        (kind, median(taken), round(seen[kind], 4) if kind in seen else "")
        for kind, taken in times.items()
    ]
    show(
        f"Looking up {options.texts} texts of each kind, {options.repetitions} times; chance alone "
        f"gives an advantage of up to {result['advantage_by_chance']}",
        ("text", "µs", "advantage over nobody's"),
        rows,
        result,
    )
    return result


def advantage(one: Sequence[float], other: Sequence[float]) -> float:
    """How much more than half of all pairs have the larger value on the same side: 0 to 0.5.

    From the ranks of all values together (Mann and Whitney); equal values count half.
    """
    ranked = sorted(chain(((value, True) for value in one), ((value, False) for value in other)))
    ranks, start = 0.0, 0
    while start < len(ranked):
        end = start
        while end < len(ranked) and ranked[end][0] == ranked[start][0]:
            end += 1
        middle = (start + 1 + end) / 2
        ranks += middle * sum(mine for _, mine in ranked[start:end])
        start = end
    pairs = len(one) * len(other)
    return abs((ranks - len(one) * (len(one) + 1) / 2) / pairs - 0.5)


def _chance(count: int) -> float:
    """Standard deviation of the share of pairs, for two kinds of `count` alike values."""
    return math.sqrt((2 * count + 1) / (12 * count * count))


def _key(keys: KeyMaker, namespace: str, ids: Sequence[int]) -> BlockKey:
    return keys.key(
        namespace=namespace,
        kind="chunk",
        fingerprint=_FINGERPRINT,
        codec="raw",
        codec_version=1,
        codec_digest="",
        prefix_ids=(),
        token_ids=ids,
    )


def _store(store: TieredStore, key: BlockKey, ids: Sequence[int]) -> None:
    shape = (1, 1, len(ids), 8)
    block = encode_block(
        key=key,
        kind="chunk",
        fingerprint=_FINGERPRINT,
        token_ids=ids,
        k_shape=shape,
        v_shape=shape,
        dtype="float16",
        codec="raw",
        codec_version=1,
        codec_digest="",
        segments=[bytes(32 * len(ids))],
    )
    store.put(key, block)
