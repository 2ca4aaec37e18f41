"""Traces of block uses, made up or of real retrieval, and what a policy makes of one.

A trace is replayed against the ledger alone: what is counted needs no bytes to be moved.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from kvrag.bench.items import Item
from kvrag.retrieval.embedder import Embedder
from kvrag.store.admission import SecondUse
from kvrag.store.eviction import policy_named
from kvrag.store.keys import BlockKey
from kvrag.store.ledger import Ledger

__all__ = [
    "CONTESTANTS",
    "Rates",
    "Use",
    "numbered_key",
    "passages_of",
    "replay",
    "retrieval_trace",
    "zipf_trace",
]

_TAG = "0" * 32

#: Policies, and one with admission at the second use.
CONTESTANTS = ("lru", "lfu", "cost", "s3-fifo", "lru, second use")


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a block: its number, its size in bytes, and its tokens."""

    number: int
    nbytes: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Share of the uses that were hits, and of the tokens that so need no computing."""

    hits: float
    tokens: float


def numbered_key(number: int, tag: str = _TAG) -> BlockKey:
    """A key that looks like any other."""
    return BlockKey(tag, hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).hexdigest())


def zipf_trace(
    uses: int, *, blocks: int, bytes_per_token: int, seed: int, exponent: float = 0.9
) -> list[Use]:
    """Blocks of 32 to 256 tokens by a Zipf law; each tenth of it ends in a scan of a fifth of it.

    What a scan touches is never used again: a batch job, or somebody who reads all once.
    """
    rng = random.Random(seed)
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(blocks)))
    sizes = [rng.randint(32, 256) for _ in range(blocks)]
    drawn = rng.choices(range(blocks), cum_weights=weights, k=uses)
    trace, fresh = [], blocks
    for begun in range(0, uses, max(1, uses // 10)):
        some = drawn[begun : begun + max(1, uses // 10)]
        trace += [Use(number, sizes[number] * bytes_per_token, sizes[number]) for number in some]
        for _ in range(len(some) // 5):
            tokens = rng.randint(32, 256)
            trace.append(Use(fresh, tokens * bytes_per_token, tokens))
            fresh += 1
    return trace


def retrieval_trace(
    items: Sequence[Item],
    embedder: Embedder,
    tokens_of: Sequence[int],
    *,
    k: int,
    bytes_per_token: int,
) -> list[Use]:
    """The `k` nearest of all items' passages for each question, in the order of the items.

    `tokens_of`: of each passage, in the order of `passages_of(items)`.
    """
    texts = passages_of(items)
    vectors = embedder.embed_documents(texts)
    trace = []
    for item in items:
        scores = vectors @ embedder.embed_query(item.question)
        for number in np.argsort(-scores, kind="stable")[:k].tolist():
            tokens = tokens_of[number]
            trace.append(Use(number, tokens * bytes_per_token, tokens))
    return trace


def passages_of(items: Iterable[Item]) -> list[str]:
    """Title and text of all passages, each once."""
    return list(
        dict.fromkeys(
            f"{passage['title']}\n{passage['text']}" for item in items for passage in item.passages
        )
    )


def replay(trace: Sequence[Use], contestant: str, limit_bytes: int) -> Rates:
    """Hit rates of a tier that begins empty."""
    name, _, second_use = contestant.partition(", ")
    ledger = Ledger(limit_bytes, policy=policy_named(name))
    seen = SecondUse() if second_use else None
    keys: dict[int, BlockKey] = {}
    hits = saved = 0
    for use in trace:
        key = keys.get(use.number)
        if key is None:
            key = keys[use.number] = numbered_key(use.number)
        if ledger.touch(key):
            hits += 1
            saved += use.tokens
        elif seen is None or seen.again(key):
            _write(ledger, key, use)
    return Rates(hits / len(trace), saved / sum(use.tokens for use in trace))


def _write(ledger: Ledger, key: BlockKey, use: Use) -> None:
    reservation = ledger.reserve(key, use.nbytes, cost=use.tokens)
    if reservation is not None:
        for victim in reservation.victims:
            ledger.evicted(reservation, victim)
        ledger.commit(reservation)
