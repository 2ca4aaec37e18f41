"""The invariants of fusion for every family under every strategy, in float64, with raw blocks.

Ratio 1 is full prefill; a chunk behind its corpus prefix is exact at any ratio; ratio 0 is reuse;
a recomputed row sees what its layer allows and nothing else; order changes neither keys nor loads.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from kvrag.fusion import create, strategy_names
from kvrag.generation.decode import decode
from kvrag.generation.params import GenerationParams
from tests.fusion.checks import BOUND, RATIOS, check_blend
from tests.fusion.dense import Dense
from tests.fusion.rooms import CHUNKS, OTHER_PREFIX, PREFIX, QUESTION, CountingTier, Room
from tests.models.tiny_models import FEW, LONG, VARIANTS, token_ids

IDS = [*PREFIX, *(token_id for chunk in CHUNKS for token_id in chunk), *QUESTION]
#: Strategies to which the ratio means something: 0 and 1 are the ends between reuse and full.
SELECTING = [name for name in strategy_names() if name not in ("reuse", "full")]
assert SELECTING, "no strategy would be tested between the ends"

every_variant = pytest.mark.parametrize(("family", "rope"), VARIANTS)
#: What a strategy does with a family does not depend on how its angles are made.
every_family = pytest.mark.parametrize(("family", "rope"), FEW)


@pytest.fixture(scope="module")
def made(tiny):
    """A room with the chunks stored, and the dense reference, made once a variant."""
    kept = {}

    def make(family, rope):
        if (family, rope) not in kept:
            folder = tiny(family, rope)
            room = Room(folder)
            room.add(*CHUNKS)
            kept[family, rope] = room, Dense(tiny.reference(folder))
        return kept[family, rope]

    return make


@every_variant
def test_the_dense_reference_is_transformers(tiny, family, rope):
    """What blending is held against is itself held against transformers' whole pass."""
    folder, ids = tiny(family, rope), token_ids(LONG)
    hf = tiny.reference(folder)
    with torch.inference_mode():
        expected = hf(torch.tensor([ids])).logits[0]
    logits, _ = Dense(hf).causal(ids)
    torch.testing.assert_close(logits, expected, atol=1e-11, rtol=0)


@every_variant
def test_scattered_rows_equal_the_dense_reference(made, family, rope):
    """At every ratio, and with a prompt prefix that is not the corpus's."""
    room, dense = made(family, rope)
    results = {ratio: check_blend(room, dense, ratio)[0].logits for ratio in RATIOS}
    check_blend(room, dense, 0.3, prefix=OTHER_PREFIX)
    full = dense.causal(IDS)[0][-1:]
    torch.testing.assert_close(results[1.0], full, atol=BOUND, rtol=0)
    # Or nothing was tested: these prompts need repair.
    assert (results[0.0] - full).abs().max() > 1e-2
    assert (results[0.5] - results[0.0]).abs().max() > 1e-4


@every_family
@pytest.mark.parametrize("name", [*SELECTING, "full"])
@pytest.mark.parametrize("prefix", [PREFIX, OTHER_PREFIX], ids=["same", "other"])
def test_ratio_1_is_full_prefill(made, family, rope, name, prefix):
    room, dense = made(family, rope)
    prefilled = room.run(CHUNKS, create(name, 1.0), prefix=prefix)
    expected = dense.causal([*prefix, *IDS[len(PREFIX) :]])[0][-1:]
    torch.testing.assert_close(prefilled.logits, expected, atol=BOUND, rtol=0)


@every_family
@pytest.mark.parametrize("name", strategy_names())
def test_one_chunk_behind_its_corpus_prefix_is_full_prefill(made, family, rope, name):
    """Its stored KV is exact there, so nothing may make it worse, and nothing needs computing."""
    room, dense = made(family, rope)
    expected = dense.causal([*PREFIX, *CHUNKS[0], *QUESTION])[0][-1:]
    for ratio in RATIOS:
        strategy = create(name, ratio)
        prefilled = room.run(CHUNKS[:1], strategy)
        torch.testing.assert_close(prefilled.logits, expected, atol=BOUND, rtol=0)
        if strategy.uses_blocks:
            assert prefilled.effective_ratio == 0


@every_family
@pytest.mark.parametrize("name", SELECTING)
def test_ratio_0_is_reuse_bit_for_bit(made, family, rope, name):
    room, _ = made(family, rope)
    for prefix in (PREFIX, OTHER_PREFIX):
        blended = room.run(CHUNKS, create(name, 0.0), prefix=prefix)
        reused = room.run(CHUNKS, create("reuse"), prefix=prefix)
        assert torch.equal(blended.logits, reused.logits)
        end = room.prompt(CHUNKS, prefix=prefix).question_start
        for ours, theirs in zip(
            [*blended.cache.k, *blended.cache.v], [*reused.cache.k, *reused.cache.v], strict=True
        ):
            assert torch.equal(ours[:, end : end + 8], theirs[:, end : end + 8])


@every_family
@pytest.mark.parametrize("name", strategy_names())
def test_what_is_fused_can_be_decoded(made, family, rope, name):
    """Each token goes on from the cache as after a whole prefill, beyond every window's reach."""
    room, dense = made(family, rope)
    # Reuse is exact with one chunk alone.
    chunks = CHUNKS[:1] if name == "reuse" else CHUNKS
    prefilled = room.run(chunks, create(name, 1.0))
    ids = [*PREFIX, *itertools.chain(*chunks), *QUESTION]
    params = GenerationParams(max_tokens=10)
    steps = decode(room.model, prefilled.cache, prefilled.logits, params, lambda: False)
    said = [step.token_id for step in steps if step.token_id is not None]
    greedy = dense.causal([*ids, *said])[0][len(ids) - 1 : -1].argmax(-1)
    assert said == greedy.tolist()
    assert said


@every_family
def test_order_changes_neither_keys_nor_loads(tiny, family, rope):
    """Of a layer without a window every chunk is read, whatever the order; stored bytes are one.

    Where a layer has a window, what is read is what lies within, see tests/fusion/test_windows.py.
    """
    tier = CountingTier()
    room = Room(tiny(family, rope), tier=tier)
    room.add(*CHUNKS)
    keys = [room.blocks.key(chunk) for chunk in CHUNKS]
    stored = {key: tier.content(key) for key in keys}
    windows = [layer.window for layer in room.model.decoder.layers]
    whole = {(key, layer) for key in keys for layer, w in enumerate(windows) if w is None}
    for order in itertools.permutations(range(3)):
        for name in strategy_names():
            tier.read.clear()
            room.run([CHUNKS[i] for i in order], create(name, 0.3))
            read = {(key, layer) for key, layer in tier.read if windows[layer] is None}
            assert read == (whole if create(name).uses_blocks else set())
            assert len(tier.read) == len(set(tier.read)), "a segment was read twice"
    assert [room.blocks.key(chunk) for chunk in CHUNKS] == keys
    assert sorted(tier.keys(), key=str) == sorted(keys, key=str)
    assert dict(zip(keys, map(tier.content, keys), strict=True)) == stored
