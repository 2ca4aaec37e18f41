"""Which rows each selector takes, against their definitions, and what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrag.errors import InputError, UnknownStrategyError
from kvrag.fusion import create, strategy_names
from kvrag.fusion.epic import Epic
from kvrag.fusion.query_attention import grouped
from kvrag.fusion.question_blend import Fast
from kvrag.fusion.selection import Choice, best, share
from tests.fusion.rooms import CHUNKS, OTHER_PREFIX, QUESTION, Room

SELECTING = ["random", "nearest", "cacheblend", "dhd", "query_attention", "fast", "true"]


@pytest.fixture(scope="module")
def room(tiny):
    room = Room(tiny("llama"))
    room.add(*CHUNKS)
    return room


@given(scores=st.lists(st.floats(-10, 10), min_size=1, max_size=40), count=st.integers(0, 50))
def test_best_takes_the_highest_in_order(scores, count):
    choice = best(torch.tensor(scores), count)
    rows = choice.rows.tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == min(count, len(scores))
    left_out = [score for row, score in enumerate(scores) if row not in rows]
    if rows and left_out:
        assert min(scores[row] for row in rows) >= max(left_out) - 1e-6


@pytest.mark.parametrize(
    ("ratio", "count", "rows"), [(0, 10, 0), (0.01, 10, 1), (0.25, 10, 2), (1, 10, 10), (0.5, 0, 0)]
)
def test_share(ratio, count, rows):
    assert share(ratio, count) == rows


@pytest.mark.parametrize("name", SELECTING)
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_a_selector_takes_about_its_share(room, name, ratio):
    prefilled = room.run(CHUNKS, create(name, ratio))
    repairable = len(prefilled.prompt.repairable)
    most = {"cacheblend": 1.3, "fast": 2.0, "true": 2.0}.get(name, 1.0)
    assert 1 <= prefilled.tokens.recomputed <= math.ceil(most * ratio * repairable) + 1


@pytest.mark.parametrize("tokens", [0, 1, 3, 99])
def test_epic_takes_the_first_tokens_of_every_chunk_but_the_exact_one(room, tokens):
    prefilled = room.run(CHUNKS, Epic(tokens=tokens))
    assert prefilled.tokens.recomputed == sum(min(tokens, len(chunk)) for chunk in CHUNKS[1:])
    other = room.run(CHUNKS, Epic(tokens=tokens), prefix=OTHER_PREFIX)
    assert other.tokens.recomputed == sum(min(tokens, len(chunk)) for chunk in CHUNKS)


def test_nearest_takes_the_rows_before_the_question(room):
    prefilled = room.run(CHUNKS, create("nearest", 0.25))
    taken = [t.position for t in prefilled.per_token() if t.recomputed]
    end = prefilled.prompt.question_start
    assert taken == list(range(end - len(taken), end))


def test_random_draws_by_its_seed(room):
    def rows(seed):
        prefilled = room.run(CHUNKS, create(f"random:seed={seed}", 0.3))
        return [t.position for t in prefilled.per_token() if t.recomputed]

    assert rows(1) == rows(1) != rows(2)


def test_window_grouping_keeps_dense_windows_and_drops_loners():
    scores = torch.zeros(30)
    rows = torch.tensor([3, 4, 5, 6, 8, 20])
    kept = grouped(Choice(rows, scores), window=8, least=5).rows.tolist()
    assert kept == list(range(1, 11))
    lonely = Choice(torch.tensor([1, 15, 29]), scores)
    assert grouped(lonely, window=8, least=5).rows.tolist() == [1, 15, 29]


def test_fast_never_takes_more_rows_than_its_bound(room):
    strategy = Fast(ratio=0.5, most_rows=3)
    prefilled = room.run(CHUNKS, strategy)
    assert prefilled.tokens.recomputed == 6  # twice as many begin


@pytest.mark.parametrize("name", ["fast", "true", "query_attention"])
def test_the_questions_own_pass_is_in_the_effective_ratio(room, name):
    prefilled = room.run(CHUNKS, create(name, 0.01))
    layers = room.model.decoder.config.num_layers
    asked = max(create(name, 0.01).question_layers(room.model.decoder, prefilled.prompt)) + 1
    assert prefilled.effective_ratio >= asked * len(QUESTION) / (
        layers * prefilled.prompt.context_tokens
    )


@pytest.mark.parametrize("name", [*SELECTING, "epic", "reuse", "full"])
def test_per_token_report(room, name):
    prefilled = room.run(CHUNKS, create(name))
    prompt = prefilled.prompt
    assert [t.position for t in prefilled.per_token()] == list(
        range(len(prompt.prefix_ids), prompt.question_start)
    )
    if name != "full":
        assert sum(t.recomputed for t in prefilled.per_token()) == prefilled.tokens.recomputed
    scored = [t for t in prefilled.per_token() if t.score is not None]
    assert all(math.isfinite(t.score) for t in scored)
    assert bool(scored) == (name not in ("reuse", "full"))
    exact = len(prompt.prefix_ids) + len(CHUNKS[0])
    assert all(t.position >= exact for t in scored)


def test_options_behind_a_name():
    assert create("epic:tokens=4") == Epic(tokens=4)
    assert create("fast:ratio=0.5,most_rows=7") == Fast(ratio=0.5, most_rows=7)
    assert create("fast:ratio=0.5", 0.25) == Fast(ratio=0.25)
    assert create("cacheblend:deviation=kv").deviation == "kv"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("epic:rows=4", "no option 'rows'; it has ratio"),
        ("epic:tokens=many", "must be like 2"),
        ("epic:tokens=-1", "whole number of 0 or more"),
        (f"random:seed={2**70}", "whole number of 0 or more"),
        ("cacheblend:deviation=q", "one of v, k, kv"),
        ("fast:ratio=2", "between 0 and 1"),
        ("fast:ratio=nan", "between 0 and 1"),
        ("query_attention:window=1.5", "must be like 0"),
        ("epic:", "no option ''; it has ratio .*, tokens .*, as in epic:ratio=0.15"),
        ("epic:tokens=4,", "no option ''"),
        ("epic:,tokens=4", "no option ''"),
        ("epic:tokens", "must be like 2"),
        ("epic:tokens=2,tokens=2", "'tokens' of strategy 'epic' is given twice"),
        ("epic:tokens=2:tokens=4", "must be like 2"),
        ("epic::tokens=2", "no option ':tokens'"),
    ],
)
def test_options_that_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        create(spec)


def test_a_ratio_behind_a_name_is_checked_even_where_another_is_stronger():
    """Regression: `fast:ratio=7` passed if the request had a good ratio of its own."""
    with pytest.raises(InputError, match=r"ratio is 7\.0"):
        create("fast:ratio=7", 0.5)


@pytest.mark.parametrize("name", ["slow", "", ":", "fast ", None, 3])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(UnknownStrategyError, match=r"known are .*fast.*true"):
        create(name)


def test_the_presets_are_registered():
    assert {"fast", "true", "full", "reuse", *SELECTING} <= set(strategy_names())
