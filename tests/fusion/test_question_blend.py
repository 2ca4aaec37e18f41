"""Strategies that select against the dense reference: exact for their rows, the right rows."""

from __future__ import annotations

import pytest
import torch

from kvrag.fusion import create
from kvrag.fusion.question_blend import Fast, QuestionBlend, TrueBlend
from kvrag.fusion.selection import Choice
from tests.fusion.checks import BOUND, check
from tests.fusion.dense import Dense
from tests.fusion.rooms import CHUNKS, OTHER_PREFIX, PREFIX, QUESTION, Recorded, Room

NAMES = ["fast", "true", "query_attention", "dhd", "epic", "random", "nearest"]
#: Enough layers that rows stop before the last, and windows, and layers without RoPE.
DEEP = {"num_hidden_layers": 7}
MODELS = [("llama", "llama3"), ("qwen2", "yarn"), ("gemma3", "default"), ("phi3", "longrope")]


def run_both(room, dense, strategy, prefix=PREFIX):
    """A run, and the same by the reference with the rows that the run chose."""
    recorded = Recorded(strategy)
    prefilled = room.run(CHUNKS, recorded, prefix=prefix)

    def choose(layer, positions, deviations):
        return recorded.kept.get(layer, positions)

    expected = dense.blend(
        prefix,
        room.blocks.prefix_ids,
        CHUNKS,
        QUESTION,
        recorded.begun,
        choose,
    )
    return prefilled, recorded, expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("family", "rope"), MODELS[:2])
def test_every_selector_is_exact_for_its_rows(tiny, name, family, rope):
    folder = tiny(family, rope, **DEEP)
    room, dense = Room(folder), Dense(tiny.reference(folder))
    room.add(*CHUNKS)
    for ratio in (0.1, 0.5):
        prefilled, recorded, expected = run_both(room, dense, create(name, ratio))
        assert recorded.begun or name == "dhd"
        check(prefilled, *expected)


@pytest.mark.parametrize("name", ["fast", "true", "query_attention"])
@pytest.mark.parametrize(("family", "rope"), MODELS[2:])
def test_windows_and_partial_rope(tiny, name, family, rope):
    folder = tiny(family, rope)
    room, dense = Room(folder), Dense(tiny.reference(folder))
    room.add(*CHUNKS)
    for prefix in (PREFIX, OTHER_PREFIX):
        prefilled, _, expected = run_both(room, dense, create(name, 0.3), prefix)
        check(prefilled, *expected)


@pytest.mark.parametrize("name", NAMES)
def test_ratio_1_is_full_prefill_and_0_is_reuse(tiny, name):
    folder = tiny("llama", "llama3", **DEEP)
    room = Room(folder)
    room.add(*CHUNKS)
    full, reuse = room.run(CHUNKS, create("full")), room.run(CHUNKS, create("reuse"))
    torch.testing.assert_close(
        room.run(CHUNKS, create(name, 1.0)).logits, full.logits, atol=BOUND, rtol=0
    )
    torch.testing.assert_close(
        room.run(CHUNKS, create(name, 0.0)).logits, reuse.logits, atol=BOUND, rtol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_one_chunk_behind_its_prefix_is_full_prefill(tiny, name):
    room = Room(tiny("llama", "llama3", **DEEP))
    full = room.run(CHUNKS[:1], create("full"))
    for ratio in (0.0, 0.2, 1.0):
        prefilled = room.run(CHUNKS[:1], create(name, ratio))
        torch.testing.assert_close(prefilled.logits, full.logits, atol=BOUND, rtol=0)


@pytest.mark.parametrize("cls", [Fast, TrueBlend])
def test_rows_are_those_of_highest_attention_times_deviation(tiny, cls):
    folder = tiny("llama", "llama3", **DEEP)
    room, dense = Room(folder), Dense(tiny.reference(folder))
    strategy: QuestionBlend = cls(ratio=0.2)
    _, recorded, _ = run_both(room, dense, strategy)
    prompt = room.prompt(CHUNKS)
    layers = strategy.question_layers(room.model.decoder, prompt)
    assert list(layers) == [2, 3, 4, 5]
    attention = dense.question_attention(PREFIX, PREFIX, CHUNKS, QUESTION)[layers].mean(dim=0)
    candidates = list(prompt.repairable)
    wanted = round(2 * round(0.2 * len(candidates)))
    best = sorted(candidates, key=lambda position: -attention[position])[:wanted]
    assert recorded.begun == sorted(best)
    # Deviations are those of the pass itself, which the reference repeats with the same rows.
    seen = {}

    def choose(layer, positions, deviations):
        seen[layer] = dict(zip(positions, deviations.sqrt().tolist(), strict=True))
        return recorded.kept.get(layer, positions)

    dense.blend(
        PREFIX,
        PREFIX,
        CHUNKS,
        QUESTION,
        recorded.begun,
        choose,
    )
    scores = {p: attention[p] * seen[1][p] for p in recorded.begun}
    half = sorted(recorded.begun, key=lambda position: -scores[position])[: wanted // 2]
    assert recorded.kept[1] == sorted(half)
    assert recorded.kept[6] == []


def test_asking_the_question_first_changes_nothing_but_the_choice(tiny):
    """The same rows, chosen without the question's pass, give the same result."""
    room = Room(tiny("qwen2", "yarn", **DEEP))
    room.add(*CHUNKS)
    asked = Recorded(create("query_attention", 0.3))
    first = room.run(CHUNKS, asked)

    class Given(type(asked)):
        def question_layers(self, decoder, prompt):
            return ()

        def begin(self, prompt, candidates, attention):
            rows = torch.tensor([position - candidates.start for position in asked.begun])
            return Choice(rows, torch.zeros(len(candidates)))

    second = room.run(CHUNKS, Given(create("query_attention", 0.3)))
    torch.testing.assert_close(first.logits, second.logits, atol=BOUND, rtol=0)
