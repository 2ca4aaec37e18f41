"""The KV cache of one request and the cache of prefixes."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.generation.kv_cache import KVCache
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.models.forward import append, extend
from kvrag.models.source import open_model
from tests.models.tiny_models import token_ids

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder(tiny):
    folder = tiny("qwen3", "llama3")
    return open_model(str(folder), folder, dtype=torch.float64).decoder


def empty(decoder, capacity=1, dtype=torch.float64):
    return KVCache(decoder.config, capacity, dtype=dtype, device=CPU)


def same(one, other):
    assert one.length == other.length
    for a, b in zip([*one.k, *one.v], [*other.k, *other.v], strict=True):
        assert torch.equal(a[:, : one.length], b[:, : one.length])


def test_shape_and_size(decoder):
    cache = empty(decoder, 10)
    assert cache.capacity == 10
    assert cache.nbytes == 2 * 4 * (2 * 10 * 16) * 8
    assert empty(decoder, 0).capacity == 1


def test_layers_are_views_of_one_tensor(decoder):
    """Also after it has grown."""
    cache = empty(decoder, 10)
    for capacity in (10, 15):
        cache.reserve(capacity)
        assert cache.kv.shape == (4, 2, 2, capacity, 16)
        assert cache.kv.is_contiguous()
        assert cache.nbytes == cache.kv.numel() * 8
        cache.kv.copy_(torch.arange(cache.kv.numel()).view(cache.kv.shape))
        for layer, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
            assert torch.equal(k, cache.kv[layer, 0])
            assert torch.equal(v, cache.kv[layer, 1])
        cache.k[3][1, 9, 15] = -1
        assert cache.kv[3, 0, 1, 9, 15] == -1


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=6))
def test_growing_and_truncating_change_nothing_else(decoder, steps):
    """Whatever was appended and forgotten before: the same bits as in a roomy cache."""
    grown, roomy, kept = empty(decoder), empty(decoder, 400), []
    for seed, (more, forget) in enumerate(steps):
        ids = token_ids(more, seed=seed)
        for cache in (grown, roomy):
            append(decoder, ids, cache)
        kept += ids
        length = max(0, len(kept) - forget)
        kept = kept[:length]
        for cache in (grown, roomy):
            cache.truncate(length)
    same(grown, roomy)
    if kept:
        fresh = empty(decoder)
        append(decoder, kept, fresh)
        for a, b in zip(grown.k, fresh.k, strict=True):
            torch.testing.assert_close(a[:, : len(kept)], b[:, : len(kept)], atol=1e-10, rtol=0)


def test_growth_is_geometric(decoder):
    cache = empty(decoder, 8)
    capacities = set()
    for length in range(1, 200):
        cache.reserve(length)
        assert cache.capacity >= length
        capacities.add(cache.capacity)
    assert len(capacities) < 12
    before = cache.k[0]
    cache.reserve(10)
    assert cache.k[0] is before


@pytest.mark.parametrize("length", [-1, 6])
def test_truncate_out_of_range(decoder, length):
    cache = empty(decoder)
    append(decoder, token_ids(5), cache)
    with pytest.raises(ValueError, match=f"5 positions to {length}"):
        cache.truncate(length)
    assert cache.length == 5


def test_write_converts_and_does_not_move_length(decoder):
    cache = empty(decoder, 8, dtype=torch.float32)
    k = torch.randn(2, 3, 16, dtype=torch.float64)
    cache.write(1, torch.tensor([1, 4, 7]), k, -k)
    assert torch.equal(cache.k[1][:, [1, 4, 7]], k.float())
    assert torch.equal(cache.v[1][:, [1, 4, 7]], -k.float())
    assert cache.length == 0


def test_two_caches_share_nothing(decoder):
    one, two = empty(decoder), empty(decoder)
    append(decoder, token_ids(9), one)
    append(decoder, token_ids(9), two)
    before = extend(decoder, [5], two)
    two.truncate(9)
    extend(decoder, token_ids(30, seed=1), one)
    assert torch.equal(extend(decoder, [5], two), before)


# ---- prefixes ------------------------------------------------------------------------------------


def test_prefix_is_the_same_bit_for_bit_whether_cached_or_not(decoder):
    prefixes, ids = PrefixCache(decoder), token_ids(20)
    computed, cached, plain = empty(decoder), empty(decoder), empty(decoder)
    assert not prefixes.fill(computed, ids)
    assert prefixes.fill(cached, ids)
    append(decoder, ids, plain)
    same(computed, plain)
    same(cached, plain)


@torch.inference_mode()
def test_a_request_cannot_change_a_cached_prefix(decoder):
    prefixes, ids = PrefixCache(decoder), token_ids(20)
    for _ in range(2):
        cache = empty(decoder)
        prefixes.fill(cache, ids)
        extend(decoder, token_ids(30, seed=1), cache)
        for tensor in (*cache.k, *cache.v):
            tensor.fill_(torch.nan)
    cache, plain = empty(decoder), empty(decoder)
    assert prefixes.fill(cache, ids)
    append(decoder, ids, plain)
    same(cache, plain)


def test_prefixes_are_told_apart_and_the_oldest_goes(decoder):
    prefixes = PrefixCache(decoder, limit=2)
    a, b, c = token_ids(5), token_ids(6), token_ids(5, seed=1)
    assert [prefixes.fill(empty(decoder), ids) for ids in (a, b, a, c)] == [
        False,
        False,
        True,
        False,
    ]
    assert prefixes.fill(empty(decoder), a)
    assert not prefixes.fill(empty(decoder), b)
    assert not prefixes.fill(empty(decoder), a[:-1])


def test_threads_at_once(decoder):
    prefixes, barrier = PrefixCache(decoder, limit=2), threading.Barrier(6)
    caches: dict[int, KVCache] = {}

    def fill(number):
        barrier.wait()
        caches[number] = empty(decoder)
        prefixes.fill(caches[number], token_ids(10 + number % 3))

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, cache in caches.items():
        plain = empty(decoder)
        append(decoder, token_ids(10 + number % 3), plain)
        same(cache, plain)
