"""Our forward pass against transformers', in float64, for every family and RoPE variant."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.generation.kv_cache import KVCache
from kvrag.models.config import LayerConfig, ModelConfig
from kvrag.models.decoder import Decoder
from kvrag.models.forward import append, extend
from kvrag.models.weights import Weights, read_json
from tests.models.tiny_models import VARIANTS, reference_model, token_ids

BOUND = 1e-8


def open_decoder(folder, dtype=torch.float64):
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    return Decoder(config, Weights(folder), dtype=dtype)


def cache_of(decoder, capacity=1):
    return KVCache(
        decoder.config, capacity, dtype=decoder.compute_dtype, device=torch.device("cpu")
    )


def reference_logits(hf, ids):
    with torch.inference_mode():
        return hf(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(("family", "rope", "tied"), VARIANTS)
def test_logits_equal_transformers(tiny, family, rope, tied):
    """Whole, in pieces, and token by token; the K and V that stay are the same too."""
    folder = tiny(family, rope, tied=tied)
    decoder, hf = open_decoder(folder), reference_model(folder)
    ids = token_ids(150)
    expected = reference_logits(hf, ids)
    assert expected.std() > 0.5, "logits near zero would hide differences"

    whole = cache_of(decoder)
    torch.testing.assert_close(
        extend(decoder, ids, whole, every=True), expected, atol=BOUND, rtol=0
    )
    pieces = cache_of(decoder)
    cuts = [0, 1, 65, 66, 130, 150]
    for begin, end in itertools.pairwise(cuts):
        logits = extend(decoder, ids[begin:end], pieces)
        torch.testing.assert_close(logits[0], expected[end - 1], atol=BOUND, rtol=0)
    behind = cache_of(decoder)
    append(decoder, ids[:140], behind)
    for at in range(140, 150):
        logits = extend(decoder, [ids[at]], behind)
        torch.testing.assert_close(logits[0], expected[at], atol=BOUND, rtol=0)

    past = hf(torch.tensor([ids]), use_cache=True).past_key_values
    for index, layer in enumerate(past.layers):
        for cache in (whole, pieces, behind):
            assert cache.length == 150
            ours = cache.k[index][:, :150], cache.v[index][:, :150]
            torch.testing.assert_close(ours[0], layer.keys[0], atol=BOUND, rtol=0)
            torch.testing.assert_close(ours[1], layer.values[0], atol=BOUND, rtol=0)


@pytest.mark.parametrize(
    "shape",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 4},
        {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 10},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
        {"num_hidden_layers": 1},
        {"rms_norm_eps": 0.1},
    ],
    ids=str,
)
def test_shapes(tiny, shape):
    folder = tiny("qwen3", **shape)
    decoder = open_decoder(folder)
    ids = token_ids(70)
    ours = extend(decoder, ids, cache_of(decoder), every=True)
    expected = reference_logits(reference_model(folder), ids)
    torch.testing.assert_close(ours, expected, atol=BOUND, rtol=0)


def test_last_position_of_the_context(tiny):
    folder = tiny("llama", "llama3")
    decoder = open_decoder(folder)
    ids = token_ids(decoder.config.max_positions)
    ours = extend(decoder, ids, cache_of(decoder))
    expected = reference_logits(reference_model(folder), ids)[-1:]
    torch.testing.assert_close(ours, expected, atol=BOUND, rtol=0)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_any_cut_into_pieces(tiny, lengths):
    decoder = open_decoder(tiny("qwen3", "llama3", tied=True))
    ids = token_ids(sum(lengths))
    whole = extend(decoder, ids, cache_of(decoder))
    cache, begin = cache_of(decoder), 0
    for length in lengths:
        pieces = extend(decoder, ids[begin : begin + length], cache)
        begin += length
    torch.testing.assert_close(pieces, whole, atol=BOUND, rtol=0)


def test_the_sink_gets_unrotated_kv_of_every_layer(tiny):
    """What a block holds, rotated to its place, is what the cache holds."""
    decoder = open_decoder(tiny("qwen3", "llama3"))
    cache, seen = cache_of(decoder), []
    append(decoder, token_ids(9), cache)
    append(decoder, token_ids(20, seed=1), cache, sink=lambda k, v: seen.append((k, v)))
    assert len(seen) == decoder.config.num_layers
    positions = torch.arange(9, 29)
    for layer, (k, v) in zip(decoder.layers, seen, strict=True):
        assert torch.equal(layer.rotate(k, positions), cache.k[layer.index][:, 9:29])
        assert torch.equal(v, cache.v[layer.index][:, 9:29])


def test_layers_may_differ(tiny):
    """A window and a missing RoPE are properties of a layer, and the layer next to it has none."""
    folder = tiny("llama")
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    plain = config.layers[0]
    layers = (plain, LayerConfig(plain.rope, window=4), LayerConfig(None), plain)
    config = dataclasses.replace(config, layers=layers)
    decoder = Decoder(config, Weights(folder), dtype=torch.float64)
    assert [layer.window for layer in decoder.layers] == [None, 4, None, None]
    k = torch.randn(2, 3, 8, dtype=torch.float64)
    moved = [not torch.equal(x.rotate(k, torch.arange(3)), k) for x in decoder.layers]
    assert moved == [True, True, False, True]


def test_bfloat16_is_what_is_stored(tiny):
    """`dtype` rounds the weights; where the arithmetic is wider, only rounding differs."""
    folder = tiny("llama")
    ids = token_ids(60)
    narrow, wide = open_decoder(folder, torch.bfloat16), open_decoder(folder, torch.float32)
    ours = extend(narrow, ids, cache_of(narrow)).log_softmax(-1)
    exact = extend(wide, ids, cache_of(wide)).log_softmax(-1)
    assert narrow.dtype is torch.bfloat16
    assert ours.dtype is torch.float32
    kl = (exact.exp() * (exact - ours)).sum()
    assert 0 < kl < 0.05
    assert narrow.info()["kv_bytes_per_token"] * 2 == wide.info()["kv_bytes_per_token"]
