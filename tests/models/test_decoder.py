"""Our forward pass against transformers', in float64, for every family and RoPE variant."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvrag.generation.kv_cache import KVCache
from kvrag.models.config import LayerConfig, ModelConfig
from kvrag.models.decoder import Decoder
from kvrag.models.folder import read_json
from kvrag.models.forward import append, extend
from kvrag.models.weights import Weights
from tests.models.tiny_models import LONG, VARIANTS, tiny_config, token_ids

BOUND = 1e-8
LONGROPES = ("longrope", "partial-longrope")


def open_decoder(folder, dtype=torch.float64, *, context_length=None, **changes):
    """The folder's decoder; `changes` of its config.json."""
    raw = read_json(folder / "config.json") | changes
    config = ModelConfig.from_hf(raw, context_length=context_length)
    return Decoder(config, Weights(folder), dtype=dtype)


def cache_of(decoder, capacity=1):
    return KVCache(
        decoder.config, capacity, dtype=decoder.compute_dtype, device=torch.device("cpu")
    )


def logits_of(decoder, ids):
    return extend(decoder, ids, cache_of(decoder), every=True)


def reference_logits(hf, ids):
    with torch.inference_mode():
        return hf(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(("family", "rope"), VARIANTS)
def test_logits_equal_transformers(tiny, family, rope):
    """Whole, in pieces, and token by token; the K and V that stay are the same too."""
    folder = tiny(family, rope)
    decoder, hf = open_decoder(folder), tiny.reference(folder)
    ids = token_ids(LONG)
    expected = reference_logits(hf, ids)
    assert 0.5 < expected.std() < 20, "logits near zero would hide differences"

    whole = cache_of(decoder)
    torch.testing.assert_close(
        extend(decoder, ids, whole, every=True), expected, atol=BOUND, rtol=0
    )
    pieces = cache_of(decoder)
    for begin, end in itertools.pairwise([0, 1, 8, 66, 67, LONG]):
        logits = extend(decoder, ids[begin:end], pieces)
        torch.testing.assert_close(logits[0], expected[end - 1], atol=BOUND, rtol=0)
    behind = cache_of(decoder)
    append(decoder, ids[:60], behind)
    for at in range(60, LONG):
        logits = extend(decoder, [ids[at]], behind)
        torch.testing.assert_close(logits[0], expected[at], atol=BOUND, rtol=0)

    with torch.inference_mode():
        past = hf(torch.tensor([ids]), use_cache=True).past_key_values
    for index, layer in enumerate(past.layers):
        # Behind a window transformers keeps what the next token may see, and no more.
        window = decoder.config.layers[index].window
        kept = layer.keys.shape[2]
        assert kept == (LONG if window is None else min(LONG, window - 1))
        for cache in (whole, pieces, behind):
            assert cache.length == LONG
            ours = cache.k[index][:, LONG - kept : LONG]
            torch.testing.assert_close(ours, layer.keys[0], atol=BOUND, rtol=0)
            ours = cache.v[index][:, LONG - kept : LONG]
            torch.testing.assert_close(ours, layer.values[0], atol=BOUND, rtol=0)


@pytest.mark.parametrize(("family", "rope"), [v for v in VARIANTS if v[1] in LONGROPES])
def test_longrope_is_chosen_by_the_context_length(tiny, family, rope):
    """Never by the prompt's length, as transformers does: stored K must fit every prompt.

    transformers takes the long factors for sequences longer than the original 64 and the short
    ones for the others. So a context of 64 equals it on prompts up to 64, a longer one beyond.
    """
    folder = tiny(family, rope)
    hf, ids = tiny.reference(folder), token_ids(LONG)
    short, long = (open_decoder(folder, context_length=n) for n in (64, 65))
    whole = open_decoder(folder)
    assert (short.config.max_positions, long.config.max_positions) == (64, 65)
    below, above = reference_logits(hf, ids[:64]), reference_logits(hf, ids[:65])
    torch.testing.assert_close(logits_of(short, ids[:64]), below, atol=BOUND, rtol=0)
    torch.testing.assert_close(logits_of(long, ids[:65]), above, atol=BOUND, rtol=0)
    torch.testing.assert_close(logits_of(whole, ids[:65]), above, atol=BOUND, rtol=0)
    assert (logits_of(long, ids[:64]) - below).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(long, ids[:9]), above[:9], atol=BOUND, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_text_part_of_a_multimodal_model(tiny, tmp_path, tied):
    """Gemma 3 from 4b on is published with its image tower; its text part is the same decoder."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = tiny_config("gemma3", "linear", tied=tied)
    config = Gemma3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    hf = Gemma3ForConditionalGeneration(config)
    plain = tiny("gemma3", "linear", tied=tied)
    weights = load_file(plain / "model.safetensors")
    hf.model.language_model.load_state_dict(
        {n.removeprefix("model."): t for n, t in weights.items() if n.startswith("model.")}
    )
    if not tied:
        hf.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
    hf.save_pretrained(tmp_path)
    ids = token_ids(LONG)
    ours, theirs = open_decoder(tmp_path), open_decoder(plain)
    assert torch.equal(logits_of(ours, ids), logits_of(theirs, ids))


@pytest.mark.parametrize(
    ("family", "rope", "changes"),
    [
        ("mistral-window", "default", {"sliding_window": 17}),
        ("mistral-window", "default", {"sliding_window": None}),
        ("mistral", "default", {"rope_parameters": {"rope_theta": 1001.0}}),
        ("qwen2-window", "default", {"layer_types": ["full_attention"] * 4}),
        ("qwen2-window", "default", {"sliding_window": 8}),
        ("qwen2-window", "default", {"use_sliding_window": False}),
        ("qwen3-window", "linear", {"sliding_window": 39}),
        ("smollm3", "default", {"no_rope_layers": [1] * 5}),
        ("smollm3-window", "linear", {"no_rope_layers": [1, 0, 0, 1, 1]}),
        ("gemma3", "linear", {"query_pre_attn_scalar": 12}),
        ("gemma3", "linear", {"sliding_window": 8}),
        ("gemma3", "linear", {"layer_types": ["sliding_attention"] * 7}),
        ("gemma3", "linear", {"hidden_activation": "silu"}),
        ("phi3-window", "default", {"sliding_window": 15}),
        ("olmo2", "default", {"rms_norm_eps": 1e-3}),
        ("granite", "default", {"embedding_multiplier": 6.1}),
        ("granite", "default", {"attention_multiplier": 8**-0.5}),
        ("granite", "default", {"residual_multiplier": 0.38}),
        ("granite", "default", {"logits_scaling": 2.6}),
    ],
)
def test_what_is_compared_depends_on_each_option(tiny, family, rope, changes):
    """Or parity with transformers would say nothing of the option."""
    folder, ids = tiny(family, rope), token_ids(LONG)
    expected = reference_logits(tiny.reference(folder), ids)
    other = logits_of(open_decoder(folder, **changes), ids)
    assert (other - expected).abs().max() > 1e-4


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
    ours = logits_of(decoder, ids)
    expected = reference_logits(tiny.reference(folder), ids)
    torch.testing.assert_close(ours, expected, atol=BOUND, rtol=0)


def test_last_position_of_the_context(tiny):
    folder = tiny("llama", "llama3")
    decoder = open_decoder(folder)
    ids = token_ids(decoder.config.max_positions)
    ours = extend(decoder, ids, cache_of(decoder))
    expected = reference_logits(tiny.reference(folder), ids)[-1:]
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
