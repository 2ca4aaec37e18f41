"""Layers with a window: what no computed row can see is neither read, nor rotated, nor used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.fusion import create, fuse, strategy_names
from kvrag.generation.kv_cache import KVCache
from kvrag.models.forward import append, extend
from tests.fusion.checks import BOUND, check_blend
from tests.fusion.dense import Dense
from tests.fusion.rooms import (
    CHUNKS,
    OTHER_PREFIX,
    PREFIX,
    QUESTION,
    CountingTier,
    Recording,
    Room,
)
from tests.models.tiny_models import token_ids

LOADING = [name for name in strategy_names() if create(name).uses_blocks]
#: With global layers beside those with a window, and with none.
WINDOWED = [
    ("mistral-window", "default"),
    ("qwen3-window", "linear"),
    ("smollm3-window", "linear"),
    ("gemma3", "linear"),
    ("phi3-window", "partial-longrope"),
]
MANY = [token_ids(n, seed=40 + i) for i, n in enumerate((9, 1, 14, 2, 11, 5, 13, 1, 3))]


def first_row(prompt, name, ratio):
    """Where computing begins, by what the strategies are."""
    if name == "full":
        return len(prompt.prefix_ids)
    return prompt.question_start if name == "reuse" or ratio == 0 else prompt.repairable.start


def reach(prompt, row, window):
    """The first position that `row` and the rows behind it can see."""
    return 0 if window is None else max(0, row - (window - 1))


def chunks_within(prompt, row, window):
    """Indices of the chunks that have a position which `row` or a later row can see."""
    low = reach(prompt, row, window)
    return [i for i, span in enumerate(prompt.chunks) if any(p >= low for p in _places(span))]


def _places(span):
    return range(span.start, span.start + len(span.token_ids))


# ---- what is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "first"),
    # The chunks stand at 6 … 28, 29 … 45 and 46 … 75, the question at 76.
    [(1, 3), (2, 2), (31, 2), (32, 1), (48, 1), (49, 0), (71, 0), (400, 0)],
)
def test_reuse_asks_for_the_chunks_within_reach_of_the_question(tiny, window, first):
    """Those that reach into the last `window - 1` positions before it, and no other."""
    tier = CountingTier()
    room = Room(tiny("mistral-window", sliding_window=window), tier=tier)
    room.add(*CHUNKS)
    tier.read.clear()
    prompt, decoder = room.prompt(CHUNKS), room.model.decoder
    assert create("reuse").first_chunks(decoder, prompt) == [first] * 4
    room.run(CHUNKS, create("reuse"))
    keys = [room.blocks.key(chunk) for chunk in CHUNKS[first:]]
    assert sorted(tier.read, key=str) == sorted(
        ((key, layer) for key in keys for layer in range(4)), key=str
    )


@pytest.mark.parametrize(("family", "rope"), WINDOWED)
@pytest.mark.parametrize("name", LOADING)
@pytest.mark.parametrize("prefix", [PREFIX, OTHER_PREFIX], ids=["same", "other"])
def test_nothing_is_read_that_no_row_can_see(tiny, family, rope, name, prefix):
    """Of each layer the chunks from `first_chunks` on, each once; by the layer's own window."""
    tier = CountingTier()
    room = Room(tiny(family, rope), tier=tier)
    room.add(*MANY)
    decoder, prompt = room.model.decoder, room.prompt(MANY, prefix=prefix)
    left_out = 0
    for ratio in (0.0, 0.3):
        strategy = create(name, ratio)
        row = first_row(prompt, name, ratio)
        wanted = [chunks_within(prompt, row, layer.window) for layer in decoder.layers]
        firsts = strategy.first_chunks(decoder, prompt)
        assert [list(range(first, len(MANY))) for first in firsts] == wanted
        tier.read.clear()
        room.run(MANY, strategy, prefix=prefix)
        expected = [
            (room.blocks.key(MANY[i]), layer) for layer, some in enumerate(wanted) for i in some
        ]
        assert len(tier.read) == len(expected)
        assert set(tier.read) == set(expected)
        left_out += len(decoder.layers) * len(MANY) - len(expected)
    assert left_out > 0, "no chunk lay outside a window"


@pytest.mark.parametrize("missing", [(0,), (8,), (0, 3, 8)])
@pytest.mark.parametrize("family", ["mistral-window", "qwen2-window"])
@pytest.mark.parametrize("name", LOADING)
def test_missing_blocks_give_the_same_bits(tiny, family, missing, name):
    """Also of chunks that some layers do not ask for: their blocks are made whole and stored."""
    folder = tiny(family)
    strategy, stored, room = create(name, 0.3), Room(folder), Room(folder)
    stored.add(*MANY)
    room.add(*(chunk for i, chunk in enumerate(MANY) if i not in missing))
    expected = stored.run(MANY, strategy)
    for prefilled in (room.run(MANY, strategy), room.run(MANY, strategy)):
        assert torch.equal(prefilled.logits, expected.logits)
    for chunk in MANY:
        with stored.blocks.open(chunk) as theirs, room.blocks.open(chunk) as ours:
            assert ours.read(0, 4) == theirs.read(0, 4)


# ---- what is used --------------------------------------------------------------------------------


class PoisonedStream:
    """K and V of chunks from memory, NaN wherever no row can see; `reach` gives, for each layer,
    the first position that can be seen. Chunks before `firsts` are not handed out at all."""

    def __init__(self, blocks, prompt, firsts, reach):
        self.blocks, self.prompt, self.firsts, self.reach = blocks, prompt, firsts, reach
        self.layer = 0

    def next_layer(self):
        index, self.layer = self.layer, self.layer + 1
        return [
            tuple(self.poisoned(part, chunk, index) for part in self.blocks[chunk][index])
            for chunk in range(self.firsts[index], len(self.blocks))
        ]

    def poisoned(self, part, chunk, layer):
        part = part.clone()
        part[:, : max(0, self.reach[layer] - self.prompt.chunks[chunk].start)] = torch.nan
        return part

    def close(self):
        pass


@pytest.mark.parametrize(("family", "rope"), WINDOWED)
@pytest.mark.parametrize("name", strategy_names())
def test_what_no_row_can_see_may_hold_anything(tiny, family, rope, name):
    """The cache is NaN before the run, and so are prefix and chunks outside of the windows.

    Neither the run nor the decoding behind it may notice.
    """
    folder = tiny(family, rope)
    room = Room(folder)
    decoder, prompt = room.model.decoder, room.prompt(MANY)
    blocks = [room.blocks.layers(room.blocks.compute(chunk)) for chunk in MANY]
    more = token_ids(5, seed=8)
    for ratio in (0.0, 0.4):
        strategy = create(name, ratio)
        row = first_row(prompt, name, ratio)
        low = [reach(prompt, row, layer.window) for layer in decoder.layers]
        clean = room.run(MANY, strategy)
        logits = [clean.logits]
        logits += [extend(decoder, [token_id], clean.cache) for token_id in more]

        cache = KVCache(
            decoder.config, prompt.length, dtype=torch.float64, device=torch.device("cpu")
        )
        for tensor in (*cache.k, *cache.v):
            tensor.fill_(torch.nan)
        append(decoder, prompt.prefix_ids, cache)
        for layer, position in enumerate(low):
            cache.k[layer][:, :position] = cache.v[layer][:, :position] = torch.nan
        stream = PoisonedStream(blocks, prompt, strategy.first_chunks(decoder, prompt), low)
        fused = fuse(strategy.start(decoder, prompt, stream, cache))
        assert stream.layer == (len(decoder.layers) if strategy.uses_blocks else 0)
        poisoned = [fused.logits] + [extend(decoder, [token_id], cache) for token_id in more]
        for ours, expected in zip(poisoned, logits, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
        if name == "reuse":
            assert any(position > len(PREFIX) for position in low), "nothing was poisoned"


# ---- the exact result ----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rope"), WINDOWED)
def test_chunks_wholly_outside_a_window(tiny, family, rope):
    """Against the dense reference, which loads everything and hides what the mask hides."""
    folder = tiny(family, rope)
    room, dense = Room(folder), Dense(tiny.reference(folder))
    for ratio in (0.0, 0.15, 1.0):
        prefilled, _ = check_blend(room, dense, ratio, chunks=MANY)
    ids = [*PREFIX, *(token_id for chunk in MANY for token_id in chunk), *QUESTION]
    torch.testing.assert_close(prefilled.logits, dense.causal(ids)[0][-1:], atol=BOUND, rtol=0)


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_one_chunk_within_and_outside_of_a_window(tiny, ratio):
    """The same block twice in a prompt: read for the one place, left out for the other."""
    folder = tiny("mistral-window")
    chunks = [CHUNKS[0], CHUNKS[1], CHUNKS[2], CHUNKS[0]]
    check_blend(Room(folder), Dense(tiny.reference(folder)), ratio, chunks=chunks)


@settings(max_examples=20, deadline=None)
@given(
    window=st.sampled_from([1, 2, 5, 16, 33]),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    prefix=st.integers(1, 10),
    question=st.integers(1, 10),
    ratio=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
)
def test_any_layout_and_window(tiny, window, lengths, prefix, question, ratio):
    options = {"use_sliding_window": True, "sliding_window": window, "num_hidden_layers": 3}
    folder = tiny("qwen2", "default", max_window_layers=1, **options)
    prefix_ids = token_ids(prefix, seed=prefix)
    check_blend(
        Room(folder, corpus_prefix=prefix_ids),
        Dense(tiny.reference(folder)),
        ratio,
        chunks=[token_ids(length, seed=100 + i) for i, length in enumerate(lengths)],
        prefix=prefix_ids,
        question=token_ids(question, seed=5),
    )


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-window"])
def test_a_chunk_outside_every_window_matters_through_other_layers_alone(tiny, family):
    """Another first chunk: with a window in every layer reuse cannot tell, with global layers it
    does. Recomputed rows hand on what they saw, so full prefill tells both apart."""
    room = Room(tiny(family))
    changed = [token_ids(len(CHUNKS[0]), seed=66), *CHUNKS[1:]]
    one, other = (room.run(chunks, create("reuse")).logits for chunks in (CHUNKS, changed))
    assert torch.equal(one, other) == (family == "mistral-window")
    one, other = (room.run(chunks, create("full")).logits for chunks in (CHUNKS, changed))
    assert not torch.equal(one, other)


def test_rows_that_drop_out_do_not_narrow_what_is_seen(tiny):
    """Where few scattered rows go on, each still sees its whole window and all of no window's."""
    folder = tiny("gemma3", "linear")
    room, dense = Room(folder), Dense(tiny.reference(folder))
    for ratio in (0.02, 0.1):
        strategy = Recording(ratio=ratio)
        room.run(MANY, strategy)
        assert len(strategy.kept[1]) < 10
        check_blend(room, dense, ratio, chunks=MANY)
