"""Fusion against the dense reference, in float64: the exact result for the rows selected."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.fusion.cacheblend import CacheBlend, rows_at
from kvrag.fusion.reuse import Reuse
from tests.fusion.checks import BOUND, RATIOS, check, check_blend
from tests.fusion.dense import Dense
from tests.fusion.rooms import (
    CHUNKS,
    OTHER_PREFIX,
    PREFIX,
    QUESTION,
    Fixed,
    Recording,
    Room,
)
from tests.models.tiny_models import token_ids

CONTEXT = [token_id for chunk in CHUNKS for token_id in chunk]
#: Layers with windows and without, and some without RoPE, in one model.
MIXED = ("smollm3-window", "linear")


def context_end(chunks=CHUNKS, prefix=PREFIX):
    return len(prefix) + sum(map(len, chunks))


# ---- the exact result ----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rope"), [("llama", "llama3"), ("qwen2", "yarn"), MIXED])
def test_cacheblend_equals_the_dense_reference(tiny, family, rope):
    folder = tiny(family, rope)
    room, dense = Room(folder), Dense(tiny.reference(folder))
    room.add(*CHUNKS)
    results = {ratio: check_blend(room, dense, ratio)[0].logits for ratio in RATIOS}
    ids = [*PREFIX, *CONTEXT, *QUESTION]
    full = dense.causal(ids)[0][-1:]
    torch.testing.assert_close(results[1.0], full, atol=BOUND, rtol=0)
    # Or nothing was tested: these prompts need repair.
    assert (results[0.0] - full).abs().max() > 1e-2
    assert (results[0.5] - full).abs().max() > 1e-4


@pytest.mark.parametrize("ratio", RATIOS)
def test_another_prefix(tiny, ratio):
    """The first chunk is then as wrong as the others, and repaired like them."""
    folder = tiny(*MIXED)
    room, dense = Room(folder), Dense(tiny.reference(folder))
    prefilled, _ = check_blend(room, dense, ratio, prefix=OTHER_PREFIX)
    if ratio == 1:
        ids = [*OTHER_PREFIX, *CONTEXT, *QUESTION]
        torch.testing.assert_close(prefilled.logits, dense.causal(ids)[0][-1:], atol=BOUND, rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (8, 1), (4, 4)])
def test_query_groups(tiny, heads, kv_heads):
    folder = tiny("qwen3", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    room, dense = Room(folder), Dense(tiny.reference(folder))
    for ratio in (0.15, 0.5):
        check_blend(room, dense, ratio)


@pytest.mark.parametrize("ratio", RATIOS)
def test_long_scattered_rows(tiny, ratio):
    """More rows than a block of the kernel holds, with gaps between them."""
    folder = tiny("qwen2", "llama3")
    chunks = [token_ids(90, seed=n) for n in range(4)]
    check_blend(Room(folder), Dense(tiny.reference(folder)), ratio, chunks=chunks)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("ratio", RATIOS)
def test_models_of_few_layers(tiny, layers, ratio):
    """There may be nothing behind the layer that is the first to tell."""
    folder = tiny("llama", num_hidden_layers=layers)
    check_blend(Room(folder), Dense(tiny.reference(folder)), ratio)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    prefix=st.integers(1, 10),
    question=st.integers(1, 10),
    ratio=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    match=st.booleans(),
)
def test_any_layout(tiny, lengths, prefix, question, ratio, match):
    folder = tiny("qwen3", "llama3", num_hidden_layers=3)
    prefix_ids = token_ids(prefix, seed=prefix)
    room = Room(folder, corpus_prefix=prefix_ids if match else PREFIX)
    chunks = [token_ids(length, seed=100 + i) for i, length in enumerate(lengths)]
    check_blend(
        room,
        Dense(tiny.reference(folder)),
        ratio,
        chunks=chunks,
        prefix=prefix_ids,
        question=token_ids(question, seed=5),
    )


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_chain_of_subsets(tiny, data):
    """The pass is exact for whatever a strategy selects, not only for what deviates most."""
    folder = tiny(*MIXED)
    room, dense = Room(folder), Dense(tiny.reference(folder))
    first = len(PREFIX) + len(CHUNKS[0])
    kept, positions = {}, list(range(first, context_end()))
    for layer in range(room.model.decoder.config.num_layers):
        some = data.draw(st.sets(st.sampled_from(positions))) if positions else set()
        kept[layer] = positions = sorted(some)
    prefilled = room.run(CHUNKS, Fixed(ratio=0.5, kept=kept))
    begin = range(first, context_end())
    expected = dense.blend(PREFIX, PREFIX, CHUNKS, QUESTION, begin, lambda i, _, __: kept[i])
    check(prefilled, *expected)


def test_other_prefix_makes_the_first_chunk_selectable(tiny):
    room = Room(tiny("llama"))
    strategy = Recording(ratio=0.5)
    room.run(CHUNKS, strategy, prefix=OTHER_PREFIX)
    begin, end = len(OTHER_PREFIX), len(OTHER_PREFIX) + len(CHUNKS[0])
    assert strategy.kept[0] == list(range(begin, context_end(prefix=OTHER_PREFIX)))
    assert any(begin <= position < end for position in strategy.kept[1])
    matching = Recording(ratio=0.5)
    room.run(CHUNKS, matching)
    assert min(matching.kept[0]) == len(PREFIX) + len(CHUNKS[0])


# ---- the selection -------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.5, 0.8, 0.95, 1.0])
def test_selection_is_a_chain_of_subsets_with_the_asked_mean(tiny, ratio):
    room = Room(tiny("llama", num_hidden_layers=8))
    chunks = [token_ids(100, seed=n) for n in range(3)]
    strategy = Recording(ratio=ratio)
    prefilled = room.run(chunks, strategy)
    sets = [set(strategy.kept[layer]) for layer in sorted(strategy.kept)]
    assert len(sets) == 8
    for before, after in itertools.pairwise(sets):
        assert after <= before
    assert len(sets[0]) == 200
    mean = sum(map(len, sets[1:])) / 7 / 200
    assert mean == pytest.approx(ratio, abs=0.005)
    # The effective ratio also holds layer 0, computed for all that may be chosen.
    room.run(chunks, Reuse())
    prefilled = room.run(chunks, CacheBlend(ratio=ratio))
    rows = sum(map(len, sets))
    assert prefilled.effective_ratio == pytest.approx(rows / (8 * 300))
    assert prefilled.tokens.recomputed == len(sets[1])


@settings(max_examples=300, deadline=None)
@given(
    num_layers=st.integers(2, 80),
    ratio=st.floats(0, 1, allow_subnormal=False),
    selectable=st.integers(0, 5000),
)
def test_schedule(num_layers, ratio, selectable):
    """Never more than all rows, never growing, mean as asked to the rounding of a row."""
    rows = [rows_at(layer, num_layers, ratio, selectable) for layer in range(1, num_layers)]
    assert all(0 <= count <= selectable for count in rows)
    assert rows == sorted(rows, reverse=True)
    assert sum(rows) / len(rows) == pytest.approx(ratio * selectable, abs=0.5 + 1e-6)


def test_schedule_by_the_numbers():
    """Slightly above the mean at first, slightly below at the end; flat where there is no room."""
    assert [rows_at(layer, 30, 0.15, 1000) for layer in (1, 15, 29)] == [195, 150, 105]
    assert [rows_at(layer, 30, 0.95, 1000) for layer in (1, 29)] == [1000, 900]
    assert [rows_at(layer, 30, 1.0, 1000) for layer in (1, 29)] == [1000, 1000]
    assert [rows_at(layer, 30, 0.0, 1000) for layer in (1, 29)] == [0, 0]
    assert rows_at(1, 2, 0.15, 1000) == 150


# ---- no leak from the future ---------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rope"), [("llama", "llama3"), MIXED, ("gemma3", "linear")])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_no_row_sees_a_later_key(tiny, family, rope, ratio):
    """Other tokens in the last chunk and the question: the rows before them must not notice.

    A mask that counts rows from the bottom right, as dense causal masks do, lets scattered rows see
    keys behind their own position; at ratio 1 that cannot be seen.
    """
    folder = tiny(family, rope)
    recording = Recording(ratio=ratio)
    Room(folder).run(CHUNKS, recording)
    changed = [*CHUNKS[:2], token_ids(len(CHUNKS[2]), seed=77)]
    asked = token_ids(len(QUESTION), seed=78)
    border = len(PREFIX) + len(CHUNKS[0]) + len(CHUNKS[1])
    assert any(position < border for position in recording.kept[1])
    strategy = Fixed(ratio=ratio, kept=recording.kept)
    before = Room(folder).run(CHUNKS, strategy)
    after = Room(folder).run(changed, strategy, question=asked)
    assert not torch.equal(before.logits, after.logits)
    for layer in recording.kept:
        # What the layer computed: the rows that the one before kept, in the first all candidates.
        rows = recording.kept[max(0, layer - 1)]
        at = [position for position in rows if position < border]
        for old, new in (
            (before.cache.k[layer], after.cache.k[layer]),
            (before.cache.v[layer], after.cache.v[layer]),
        ):
            torch.testing.assert_close(old[:, at], new[:, at], atol=1e-12, rtol=0)


def test_each_row_alone_sees_its_past(tiny):
    """The same with one changed token at a time, at and around rows that are selected."""
    folder = tiny("qwen3")
    kept = {layer: [31, 40, 41, 60] for layer in range(4)}
    strategy = Fixed(ratio=0.5, kept=kept)
    base = Room(folder).run(CHUNKS, strategy)
    for position in (32, 40, 41, 59, 61):
        chunks, at = [list(chunk) for chunk in CHUNKS], position - len(PREFIX)
        for chunk in chunks:
            if at < len(chunk):
                chunk[at] = (chunk[at] + 1 - 3) % 397 + 3
                break
            at -= len(chunk)
        other = Room(folder).run(chunks, strategy)
        for old, new in zip(base.cache.v, other.cache.v, strict=True):
            torch.testing.assert_close(old[:, :position], new[:, :position], atol=1e-12, rtol=0)
        assert not torch.equal(base.cache.v[1][:, position], other.cache.v[1][:, position])
