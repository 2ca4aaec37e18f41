"""One run of a strategy held against the dense reference."""

from __future__ import annotations

import threading

import torch

from tests.fusion.rooms import CHUNKS, PREFIX, QUESTION, Recording

BOUND = 1e-8
RATIOS = (0.0, 0.05, 0.15, 0.5, 1.0)


def check(prefilled, logits, cache, seen, bound=BOUND):
    """Logits, and K and V of every layer at every position that some row saw."""
    torch.testing.assert_close(prefilled.logits, logits, atol=bound, rtol=0)
    length = prefilled.cache.length
    for index, (k, v) in enumerate(cache):
        assert k.shape[1] == length
        ours_k, ours_v = prefilled.cache.k[index], prefilled.cache.v[index]
        at = seen[index].nonzero()[:, 0]
        torch.testing.assert_close(ours_k[:, at], k[:, at], atol=bound, rtol=0)
        torch.testing.assert_close(ours_v[:, at], v[:, at], atol=bound, rtol=0)


def check_blend(room, dense, ratio, *, chunks=CHUNKS, prefix=PREFIX, question=QUESTION):
    """One cacheblend run against the dense reference, whose own deviations choose the same rows."""
    strategy = Recording(ratio=ratio)
    prefilled = room.run(chunks, strategy, prefix=prefix, question=question)
    prompt = room.prompt(chunks, question, prefix)
    first = prompt.question_start if ratio == 0 else prompt.repairable.start

    def choose(layer, positions, deviations):
        kept = strategy.kept.get(layer, positions)
        left_out = [p for p in positions if p not in kept]
        if kept and left_out:
            by_position = dict(zip(positions, deviations.tolist(), strict=True))
            assert min(by_position[p] for p in kept) >= max(by_position[p] for p in left_out)
        return kept

    corpus_prefix = room.blocks.prefix_ids
    begin = range(first, prompt.question_start)
    check(prefilled, *dense.blend(prefix, corpus_prefix, chunks, question, begin, choose))
    return prefilled, strategy.kept


def check_released(room):
    """Nothing is open, and no thread stays once what was under way is done."""
    for thread in threading.enumerate():
        if thread.name.startswith("kvrag"):
            thread.join(timeout=10)
            assert not thread.is_alive(), thread
    assert room.store.stats().open_blocks == 0


def check_same_cache(one, other):
    length = other.cache.length
    assert one.cache.length == length
    for ours, theirs in (
        *zip(one.cache.k, other.cache.k, strict=True),
        *zip(one.cache.v, other.cache.v, strict=True),
    ):
        assert torch.equal(ours[:, :length], theirs[:, :length])
