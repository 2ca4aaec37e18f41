"""The controller on machines whose speeds are known, and in an engine whose disk is slowed down."""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest
import torch

from kvrag import Engine, Settings
from kvrag.blocks import ChunkBlocks, PlacedBlocks
from kvrag.errors import InputError
from kvrag.fusion import create, strategy_names
from kvrag.fusion.controller import TierPrice
from kvrag.fusion.controller.fit import Fit
from kvrag.fusion.controller.plan import ChunkSource, Needed, alone, make_plan
from kvrag.fusion.controller.plan import _needed as needed_of
from kvrag.fusion.full import Full
from kvrag.fusion.stream import Amounts
from kvrag.models.layer import Layer
from kvrag.prefill import Prefill
from kvrag.prompting import PromptLayout
from kvrag.store.codecs import codec
from kvrag.store.disk import DiskTier
from kvrag.store.keys import KeyMaker
from tests.fusion.machine import (
    CHUNK,
    CONFIG,
    KV_NBYTES,
    Machine,
    Uniform,
    decoder,
    prompt,
    sources,
)
from tests.fusion.rooms import OTHER_PREFIX, PREFIX, Room
from tests.models.tiny_models import token_ids
from tests.store.doubles import in_threads

CACHEBLEND = create("cacheblend")
FULL = "full: loading is slower"

# ---- costs, fitted -------------------------------------------------------------------------------


def test_costs_are_found_through_noise():
    rng, fit = random.Random(1), Fit((1e-2, 1e-3))
    for _ in range(60):
        nbytes = rng.uniform(1e6, 1e8)
        fit.add((1, nbytes), (0.01 + nbytes / 1e9) * rng.uniform(0.9, 1.1))
    for nbytes in (1e6, 1e7, 1e9):
        assert fit.predict((1, nbytes)) == pytest.approx(0.01 + nbytes / 1e9, rel=0.15)


def test_costs_follow_a_drift():
    fit, speed = Fit((1e-3,)), 1e9
    for _ in range(60):
        speed *= 0.97
        fit.add((1e8,), 1e8 / speed)
    assert fit.predict((1e8,)) == pytest.approx(1e8 / speed, rel=0.2)


def test_one_measurement_far_off_changes_nothing_and_two_change_everything():
    """Proportions stay: the fixed part has grown with the rest."""
    fit = Fit((1e-2, 1e-3))
    for n in (1, 10, 1, 10, 1, 10):
        fit.add((1, n), 2 + n)
    before = fit.predict((1, 10))
    fit.add((1, 10), 60)
    assert fit.predict((1, 10)) == before
    fit.add((1, 10), 12)
    assert fit.predict((1, 10)) == pytest.approx(before, rel=1e-3)
    for _ in range(2):
        fit.add((1, 10), 60)
    assert fit.predict((1, 10)) == pytest.approx(60, rel=0.02)
    assert fit.predict((1, 1)) == pytest.approx(15, rel=0.05)


def test_two_in_opposite_directions_confirm_nothing():
    fit = Fit((1e-3,))
    for seconds in (1, 1, 1, 10, 0.1, 10, 0.1):
        fit.add((1,), seconds)
    assert fit.predict((1,)) == pytest.approx(1, rel=0.01)


def test_costs_are_never_negative():
    rng, fit = random.Random(2), Fit((1e-3, 1e-3, 1e-3))
    for _ in range(40):
        amounts = [rng.uniform(0.9, 1.1) for _ in range(3)]
        fit.add(amounts, amounts[0] * rng.uniform(0.8, 1.2))
        assert all(fit.cost(kind) >= 0 for kind in range(3))


def test_time_of_what_always_comes_together_goes_to_the_less_stiff():
    fit = Fit((1e-1, 1e-3))
    for _ in range(5):
        fit.add((1, 1e6), 1.0)
    assert fit.predict((1, 2e6)) == pytest.approx(2, rel=0.05)
    assert Fit((1e-3,)).predict((1,)) is None


# ---- plans ---------------------------------------------------------------------------------------


def test_flops_of_a_chunk_are_those_of_its_products():
    weights = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    keys = sum(30 + place for place in range(1, CHUNK + 1))
    work = alone(CONFIG, 30, CHUNK)
    assert work.attention_flops == pytest.approx(30 * 4 * 576 * keys)
    assert work.flops - work.attention_flops == pytest.approx(30 * 2 * weights * CHUNK)
    assert (work.visits, work.placed) == (30, 0)


@pytest.mark.parametrize("name", strategy_names())
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 1.0])
def test_a_strategy_knows_what_it_will_compute(tiny, name, ratio):
    room = Room(tiny("llama", num_hidden_layers=12))
    chunks = [token_ids(40, seed=n) for n in range(4)]
    strategy = create(name, ratio)
    laid_out = room.prompt(chunks, prefix=OTHER_PREFIX)
    visits = strategy.expected_visits(room.model.decoder, laid_out)
    done = room.run(chunks, strategy, prefix=OTHER_PREFIX).fusion.computed_rows
    extra = (len(visits) - 12) * len(laid_out.question_ids)
    assert sum(visit.context_rows for visit in visits) + extra == pytest.approx(
        done, abs=12 if 0 < ratio < 1 else 0
    )
    assert [visit.layer for visit in visits[-12:]] == list(range(12))


def test_bytes_are_needed_when_the_group_of_a_layer_is():
    plan = Machine().ask(2 * CHUNK, CACHEBLEND)[0].plan
    layer = 2 * (KV_NBYTES * CHUNK // 30)
    ends = [1, 3, 3, 7, 7, 7, 7, *[15] * 8, *[23] * 8, *[30] * 7]
    assert [stage.needed for stage in plan.stages] == [
        {"disk": Needed(Amounts(2, layer, 0), Amounts(0, (end - 1) * layer, 0))} for end in ends
    ]


def test_what_lies_in_the_page_cache_is_not_waited_for():
    stored = [
        ChunkSource("disk", (100, 10, 10), 1.0),
        ChunkSource("disk", (100, 10, 10), 0.25),
        ChunkSource("disk", (100, 10, 10), None),
    ]
    assert needed_of(stored, [0, 0, 0])[-1] == {
        "disk": Needed(Amounts(1.75, 175, 125), Amounts(0, 35, 25))
    }


def test_a_first_pass_of_the_question_waits_and_the_rows_do_not():
    plan = Machine().ask(1024, create("fast"))[0].plan
    asked = len(plan.stages) - 30
    assert asked > 20
    assert all(stage.needed for stage in plan.stages[:asked])
    assert [bool(stage.needed) for stage in plan.stages[asked:]] == [False] * asked + [True] * (
        30 - asked
    )


# ---- decisions -----------------------------------------------------------------------------------


def trained(strategy=CACHEBLEND, *, tokens=2048, **speeds) -> Machine:
    machine = Machine(**speeds)
    machine.precompute()
    for _ in range(6):
        machine.ask(tokens, strategy, adapt=False)
    return machine


def test_nothing_is_foreseen_before_anything_was_measured():
    machine = Machine(bytes_per_s=1e6)
    decision, _ = machine.ask(2048, CACHEBLEND)
    assert (decision.reason, decision.strategy) == ("quality", CACHEBLEND)
    assert decision.predicted_s is decision.predicted_stall_s is None


@pytest.mark.parametrize("bytes_per_s", [1e8, 1e9, 1e10])
def test_what_loads_fast_keeps_the_strategys_own_ratio(bytes_per_s):
    machine = trained(bytes_per_s=bytes_per_s, noise=0.1)
    decisions = [machine.ask(n, CACHEBLEND)[0] for n in (1024, 2048, 4096) * 5]
    assert {(d.reason, d.strategy) for d in decisions} == {("quality", CACHEBLEND)}


def test_a_few_bytes_decide_nothing():
    """A slow machine of a few kB a request says more about its scheduler than about its disk."""
    machine = Machine(bytes_per_s=1e5)
    tiny = Uniform(0.1)
    for _ in range(4):
        machine.ask(CHUNK, tiny, adapt=False)
    machine.controller._tiers["disk"]._cold.nbytes = 4 * 2**20 - 1
    assert machine.ask(CHUNK, tiny)[0].reason == "quality"
    machine.controller._tiers["disk"]._cold.nbytes = 4 * 2**20
    assert machine.ask(CHUNK, tiny)[0].reason != "quality"


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6])
def test_the_raised_ratio_is_that_of_the_papers_formula(monkeypatch, share):
    """r_load = load / prefill, where layers come one by one and nothing else takes time."""
    monkeypatch.setattr("kvrag.fusion.controller.plan.LARGEST_GROUP", 1)
    tokens = 2048
    nbytes = tokens * KV_NBYTES
    machine = Machine(latency_s=0.0)
    machine.bytes_per_s = nbytes / (share * machine.full_s(tokens))
    machine.precompute()
    for _ in range(6):
        _, own = machine.ask(tokens, Uniform(0.15), adapt=False)
    for _ in range(3):
        decision, found = machine.ask(tokens, Uniform(0.15))
        assert decision.reason == "load"
        assert decision.strategy.ratio == pytest.approx(share, abs=0.07)
    assert found.seconds <= 1.07 * own.seconds, "what was added is hidden"


def test_raising_costs_next_to_no_time():
    machine = trained(bytes_per_s=3e7)
    for tokens in (2048, 1024, 3072, 2048):
        own = machine.truth(make_plan(CACHEBLEND, decoder(), prompt(tokens), sources(tokens)))
        decision, found = machine.ask(tokens, CACHEBLEND)
        assert decision.reason == "load"
        assert decision.strategy.ratio > 0.15
        assert found.seconds <= 1.08 * own.seconds


def test_rows_that_loading_would_not_hide_are_not_added():
    """`fast` asks the question first, over all layers: what loads then hides behind no row."""
    machine = trained(create("fast"), bytes_per_s=6e7)
    decision, found = machine.ask(2048, create("fast"))
    assert found.stall_s > 0.2
    assert (decision.reason, decision.strategy) == ("quality", create("fast"))


def test_options_of_one_request_never_reach_another():
    """A raised ratio is held for the like alone."""
    machine = trained(bytes_per_s=3e7)
    other = create("cacheblend:deviation=k")
    raised = [machine.ask(2048, strategy)[0] for strategy in (CACHEBLEND, other) * 2]
    assert {d.reason for d in raised} == {"load"}
    assert [d.strategy.deviation for d in raised] == ["v", "k", "v", "k"]


@pytest.mark.parametrize("name", ["reuse", "epic", "full", "cacheblend"])
def test_what_is_fixed_stays(name):
    strategy = create(name)
    machine = trained(bytes_per_s=5e6)
    decision, _ = machine.ask(2048, strategy, adapt=name != "cacheblend")
    assert (decision.reason, decision.strategy) == ("fixed", strategy)
    assert decision.predicted_s is not None


def test_everything_is_computed_where_loading_takes_longer_and_loaded_again_when_it_does_not():
    machine = trained(bytes_per_s=4e6)
    computed = [machine.ask(2048, CACHEBLEND) for _ in range(12)]
    assert [d.reason == "probe" for d, _ in computed] == [n in (3, 11) for n in range(12)]
    assert {d.strategy for d, _ in computed if d.reason == FULL} == {Full()}
    # Attention over a whole prompt was not seen before.
    assert computed[0][0].predicted_s == pytest.approx(machine.full_s(2048), rel=0.3)
    assert computed[-2][0].predicted_s == pytest.approx(machine.full_s(2048), rel=0.03)
    machine.bytes_per_s = 2e9
    reasons = [machine.ask(2048, CACHEBLEND)[0].reason for _ in range(20)]
    # The next probe is doubted, the one after it, which follows at once, believed.
    assert reasons == [FULL] * 15 + ["probe"] * 2 + ["quality"] * 3
    estimates = machine.controller.estimates
    assert estimates.full == 10 + 15
    assert estimates.tiers["disk"].bytes_per_s > 1e9


def probed(machine, count, **options):
    """Which of so many requests loaded although full prefill was foreseen to be faster."""
    decisions = [machine.ask(2048, CACHEBLEND, **options)[0] for _ in range(count)]
    assert {d.reason for d in decisions} <= {FULL, "probe"}
    assert {d.strategy for d in decisions if d.reason == "probe"} <= {CACHEBLEND}
    return [n for n, d in enumerate(decisions, start=1) if d.reason == "probe"]


def test_probes_that_disappoint_become_rarer_and_never_end():
    assert probed(trained(bytes_per_s=4e6), 260) == [4, 12, 28, 60, 124, 188, 252]


def test_a_probe_waits_as_long_as_was_foreseen():
    machine = trained(bytes_per_s=4e6)
    (waited,) = (
        (decision, found)
        for decision, found in (machine.ask(2048, CACHEBLEND) for _ in range(4))
        if decision.reason == "probe"
    )
    assert waited[0].predicted_s == pytest.approx(waited[1].seconds, rel=0.1)
    assert waited[0].predicted_s > machine.full_s(2048)


def test_probes_of_a_tier_that_gets_better_are_frequent_again():
    """Better, and still slower than computing everything."""
    machine = trained(bytes_per_s=2e6)
    assert probed(machine, 28) == [4, 12, 28]
    machine.bytes_per_s = 3.5e6
    assert probed(machine, 40)[:2] == [32, 36]


def test_each_kind_has_its_own_probes():
    machine = trained(bytes_per_s=4e6)
    assert probed(machine, 3) == []
    other = [machine.ask(1024, CACHEBLEND)[0].reason for _ in range(4)]
    assert other == [FULL, FULL, FULL, "probe"]
    assert probed(machine, 1) == [1]


def test_one_slow_load_heals():
    """Blocks were read aside, which moves none of them: no request would ever find them in memory.

    Here a request that loads leaves its blocks in RAM, where the next ones find them.
    """
    machine, tier, reasons = trained(bytes_per_s=4e6), "disk", []
    for _ in range(8):
        decision, found = machine.ask(2048, CACHEBLEND, tier=tier)
        reasons.append(decision.reason)
        if decision.strategy.uses_blocks:
            tier = "ram"
    assert reasons == [FULL] * 3 + ["probe"] + ["quality"] * 4
    assert (decision.strategy, found.stall_s) == (CACHEBLEND, pytest.approx(0, abs=0.05))
    # What still lies on the disk is another kind.
    assert machine.ask(2048, CACHEBLEND)[0].reason == FULL


def test_noise_flips_no_decision():
    """Where loading and computing take about as long, what was decided holds."""
    machine = trained(noise=0.0)
    full_s = machine.full_s(2048)
    machine = trained(bytes_per_s=2048 * KV_NBYTES / full_s, noise=0.04)
    reasons = [machine.ask(2048, CACHEBLEND)[0].reason for _ in range(40)]
    decided = [reason for reason in reasons if reason != "probe"]
    assert len(decided) > 30
    assert sum(a != b for a, b in itertools.pairwise(decided)) <= 2


def test_the_same_measurements_lead_to_the_same_decisions():
    def run():
        machine, decisions = trained(bytes_per_s=3e7, noise=0.2), []
        for speed in (3e7, 5e6, 3e7, 2e9):
            machine.bytes_per_s = speed
            decisions += [machine.ask(2048, CACHEBLEND)[0] for _ in range(6)]
        return [(d.strategy, d.reason, d.predicted_s) for d in decisions]

    first = run()
    assert first == run()
    assert {reason for _, reason, _ in first} >= {"load", FULL, "quality"}


def test_a_missing_chunk_is_computed_alone_and_stored():
    machine = trained(bytes_per_s=4e6)
    some = [None, *sources(2048)[1:]]
    decision = machine.controller.decide(prompt(2048), CACHEBLEND, some, adapt=True)
    assert (decision.reason, decision.strategy) == ("quality", CACHEBLEND)
    whole = machine.controller.decide(prompt(2048), CACHEBLEND, sources(2048), adapt=False)
    assert decision.plan.first == alone(CONFIG, 30, CHUNK)
    assert decision.predicted_s < whole.predicted_s, "one chunk less is loaded"


def test_what_must_be_computed_alone_is_foreseen_behind_what_it_is_computed_behind(tiny):
    """It was foreseen behind the prompt's prefix, which is shorter."""
    room = Room(tiny("llama"))
    later = ChunkBlocks(
        room.model,
        room.store,
        KeyMaker(bytes(range(32))),
        codec("raw"),
        room.prefixes,
        namespace="tests",
        prefix_ids=(*PREFIX, *token_ids(40, seed=8)),
    )
    room.prefill = Prefill(
        room.model,
        PromptLayout.of(room.model.tokenizer, "Answer."),
        PlacedBlocks(room.blocks, later, room.store.locate),
        room.prefixes,
        room.controller,
    )
    decided, computed = [], []
    decide, computed_alone = room.controller.decide, room.controller.computed_alone

    def noting(*args, **options):
        decided.append(decide(*args, **options))
        return decided[-1]

    def counting(prefix, tokens, seconds):
        computed.append(alone(room.model.decoder.config, prefix, tokens))
        computed_alone(prefix, tokens, seconds)

    room.controller.decide, room.controller.computed_alone = noting, counting
    room.run([token_ids(20, seed=n) for n in range(3)], CACHEBLEND)
    total = computed[0].plus(computed[1]).plus(computed[2])
    assert decided[0].plan.first == pytest.approx(total)
    assert len(set(computed)) == 2, "the first place, and the two later ones"


# ---- forecasts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes_per_s", [1e7, 2e7, 3.5e7])
@pytest.mark.parametrize("name", ["cacheblend", "fast", "reuse"])
def test_stalls_are_foreseen_within_a_fifth(name, bytes_per_s):
    strategy = create(name)
    machine = trained(strategy, bytes_per_s=bytes_per_s, noise=0.1)
    for tokens in (1024, 3072, 2048, 4096, 1024, 2048):
        machine.ask(tokens, strategy, adapt=False)
    found = [machine.ask(n, strategy, adapt=False) for n in (1024, 2048, 4096, 3072) * 3]
    errors = [
        abs(decision.predicted_stall_s - seen.stall_s) / seen.stall_s
        for decision, seen in found
        if seen.stall_s > 0.1
    ]
    assert len(errors) >= 9
    assert sorted(errors)[len(errors) // 2] < 0.2
    estimates = machine.controller.estimates
    assert estimates.ttft_error < 0.15
    assert estimates.forecasts > 12


@pytest.mark.parametrize("beside", [1.0, 0.4])
@pytest.mark.parametrize("name", ["cacheblend", "fast", "reuse"])
def test_stalls_are_foreseen_whatever_the_page_cache_holds(name, beside):
    """Cold and cached reads were one rate, wherever between theirs the last requests had put it."""
    strategy = create(name)
    machine = trained(strategy, bytes_per_s=2e7, beside=beside, noise=0.05)
    rng = random.Random(3)
    for cached in (0, 8, 0, 8, 4):
        machine.ask(2048, strategy, adapt=False, cached_chunks=cached)
    errors = []
    for _ in range(16):
        cached = rng.choice((0, 0, 2, 4, 6, 8))
        decision, seen = machine.ask(2048, strategy, adapt=False, cached_chunks=cached)
        if seen.stall_s > 0.05:
            errors.append(abs(decision.predicted_stall_s - seen.stall_s) / seen.stall_s)
    assert len(errors) >= 8
    assert sorted(errors)[len(errors) // 2] < 0.15
    assert max(errors) < 0.5


def test_chunks_in_the_page_cache_that_were_never_seen_alone_cost_no_more_than_cold_ones():
    """They were taken to be as slow as the cold, whose rate had been found with them beside it."""
    machine = trained(bytes_per_s=2e7)
    for _ in range(8):
        decision, seen = machine.ask(2048, CACHEBLEND, adapt=False, cached_chunks=4)
    assert seen.stall_s > 0.2
    assert decision.predicted_stall_s == pytest.approx(seen.stall_s, rel=0.1)


def test_a_long_time_in_the_page_cache_does_not_make_the_disk_faster():
    machine = trained(bytes_per_s=2e7)
    for _ in range(3):
        machine.ask(2048, CACHEBLEND, adapt=False, cached_chunks=0)
    for _ in range(50):
        machine.ask(2048, CACHEBLEND, adapt=False, cached_chunks=8)
    disk = machine.controller.estimates.tiers["disk"]
    assert disk.bytes_per_s == pytest.approx(2e7, rel=0.05)
    assert disk.cached_bytes_per_s == pytest.approx(5e9, rel=0.1)
    decision, seen = machine.ask(2048, CACHEBLEND, adapt=False, cached_chunks=0)
    assert decision.predicted_stall_s == pytest.approx(seen.stall_s, rel=0.1)


def test_what_was_only_read_from_the_page_cache_leads_to_no_other_answer_and_no_advice():
    machine = Machine(bytes_per_s=2e7)
    machine.precompute()
    for _ in range(4):
        machine.ask(2048, CACHEBLEND, cached_chunks=8)
    stored = sources(2048, cached_chunks=0)
    decision = machine.controller.decide(prompt(2048), CACHEBLEND, stored, adapt=True)
    assert decision.reason == "quality"
    advice = machine.controller.cheapest_tier(
        2048, [TierPrice("disk", None, 1.0)], strategy=CACHEBLEND, nbytes_per_token=KV_NBYTES
    )
    assert (advice.choice, advice.tiers[0].bytes_per_s) == (None, None)


def test_loading_that_shares_the_core_is_not_taken_for_a_slow_tier():
    """Beside computing it takes three times as long, and nobody waits for it."""
    machine = trained(create("fast"), bytes_per_s=1e8, beside=0.3)
    for _ in range(12):
        machine.ask(2048, create("fast"), adapt=False, cached_chunks=0)
        decision, seen = machine.ask(2048, CACHEBLEND, adapt=False, cached_chunks=0)
    assert decision.predicted_stall_s == pytest.approx(seen.stall_s, abs=0.01)
    estimate = machine.controller.estimates.tiers["disk"]
    assert estimate.bytes_per_s == pytest.approx(1e8, rel=0.2)


def test_estimates_are_the_machines():
    machine = Machine(bytes_per_s=5e8, noise=0.05)
    assert machine.controller.estimates.full_flops_per_s is None
    machine.precompute()
    for tokens in (1024, 2048, 4096) * 4:
        machine.ask(tokens, CACHEBLEND)
    estimates = machine.controller.estimates
    assert estimates.tiers["disk"].bytes_per_s == pytest.approx(5e8, rel=0.15)
    assert estimates.tiers["disk"].nbytes == 4 * 7168 * KV_NBYTES
    assert 80e9 < estimates.blend_flops_per_s < 150e9
    assert 80e9 < estimates.full_flops_per_s < 150e9


def test_requests_at_the_same_time_lose_no_measurement():
    controller = trained(bytes_per_s=5e8).controller
    before = controller.estimates

    def work(index):
        machine = Machine(controller, bytes_per_s=5e8)
        for _ in range(20):
            machine.ask(1024, CACHEBLEND)
            assert controller.estimates.forecasts > 0

    in_threads(4, work)
    after = controller.estimates
    assert after.forecasts == before.forecasts + 80
    assert after.tiers["disk"].nbytes == before.tiers["disk"].nbytes + 80 * 1024 * KV_NBYTES
    assert after.tiers["disk"].bytes_per_s == pytest.approx(5e8, rel=0.05)


# ---- the cheapest tier ---------------------------------------------------------------------------


def test_the_cheapest_tier_that_hides_its_delay():
    machine = trained(bytes_per_s=5e8)
    tiers = [
        TierPrice("ram", 1e10, 3.0),
        TierPrice("disk", None, 0.1),
        TierPrice("far", 1e8, 0.02),
        TierPrice("tape", 2e6, 0.001),
        TierPrice("gift", 1e10),
        TierPrice("unseen", None, 0.0),
    ]
    advice = machine.controller.cheapest_tier(
        2048, tiers, strategy=CACHEBLEND, nbytes_per_token=KV_NBYTES
    )
    assert advice.choice == "far"
    assert [check.hides for check in advice.tiers] == [True, True, True, False, True, None]
    far, tape = advice.tiers[2], advice.tiers[3]
    assert far.load_s == pytest.approx(2048 * KV_NBYTES / 1e8)
    assert tape.ttft_s == pytest.approx(tape.load_s, rel=0.1)
    assert advice.compute_s < advice.full_s
    assert advice.nbytes == 2048 * KV_NBYTES
    # With everything recomputed there is more to hide behind; with nothing, less.
    slow = [TierPrice("slow", 2.5e7, 0.01)]
    choices = [
        machine.controller.cheapest_tier(
            2048, slow, strategy=create("cacheblend", ratio), nbytes_per_token=KV_NBYTES
        ).choice
        for ratio in (0.15, 1.0)
    ]
    assert choices == [None, "slow"]


def test_what_cannot_be_asked_is_said():
    with pytest.raises(InputError, match="0 bytes/s"):
        TierPrice("x", 0.0)
    with pytest.raises(InputError, match="costs -1"):
        TierPrice("x", 1e9, -1.0)
    ask = Machine().controller.cheapest_tier
    with pytest.raises(InputError, match="never measured"):
        ask(100, [TierPrice("x", 1e9)], strategy=CACHEBLEND, nbytes_per_token=1)
    with pytest.raises(InputError, match="0 context tokens"):
        ask(0, [TierPrice("x", 1e9)], strategy=CACHEBLEND, nbytes_per_token=1)


# ---- in an engine --------------------------------------------------------------------------------

#: Seconds a row and layer take at least: what the machine is otherwise does not matter then.
ROW_S = 1e-4


class ThrottledDisk(DiskTier):
    """A disk of so many bytes a second."""

    bytes_per_s = 1e9

    def __init__(self, root, **options):
        super().__init__(root, **options)
        self._head = threading.Lock()

    def segments(self, key, first, last):
        views = super().segments(key, first, last)
        with self._head:
            time.sleep(sum(map(len, views or ())) / ThrottledDisk.bytes_per_s)
        return views


@pytest.fixture
def throttled(tiny, tmp_path, monkeypatch):
    project = Layer.project

    def slow(layer, x):
        time.sleep(ROW_S * len(x))
        return project(layer, x)

    monkeypatch.setattr(Layer, "project", slow)
    monkeypatch.setattr("kvrag.tiers.DiskTier", ThrottledDisk)
    monkeypatch.setattr(ThrottledDisk, "bytes_per_s", 1e9)

    def opened(**settings):
        return Engine.open(
            Settings(
                model=str(tiny("llama", num_hidden_layers=12)),
                home=tmp_path / "home",
                models_dir=tmp_path / "models",
                **{"dtype": "float64", "threads": 1, "strategy": "cacheblend", "ram_bytes": 0}
                | settings,
            )
        )

    return opened


PASSAGES = [" ".join(str(n * n + place) for n in range(38)) for place in range(4)]


def ask(engine, passages=PASSAGES, **options):
    return engine.answer("Who?", passages=passages, max_tokens=1, **options)


def ask_until(engine, reason, *, most=12):
    """Answers up to the first that the controller decided on for that reason."""
    answers = []
    while not answers or answers[-1].report.control.reason != reason:
        assert len(answers) < most, [answer.report.control for answer in answers]
        answers.append(ask(engine))
    return answers


def test_a_slow_disk_raises_the_ratio_and_a_slower_one_is_not_read(throttled):
    with throttled() as engine:
        first = ask(engine)
        assert first.report.control.reason == "quality"
        assert first.report.control.predicted_ttft_s is None
        nbytes = engine.stats().tiers[1].nbytes
        full_s = ask(engine, strategy="full").report.ttft_s
        # Between what blending computes and what full prefill does.
        ThrottledDisk.bytes_per_s = nbytes / (0.6 * full_s)
        before, *_, raised = (answer.report for answer in ask_until(engine, "load"))
        assert (before.control.reason, before.control.ratio) == ("quality", 0.15)
        assert raised.control.ratio > 0.15
        assert raised.effective_ratio > before.effective_ratio
        assert raised.spans.stall > 0.05
        # What a request fixes stays.
        assert ask(engine, ratio=0.15).report.control.reason == "fixed"
        assert ask(engine, strategy="cacheblend:ratio=0.2").report.control.ratio == 0.2

        ThrottledDisk.bytes_per_s = nbytes / (3 * full_s)
        last = ask_until(engine, FULL)[-1]
        assert last.report.strategy == "full"
        assert {source.tier for source in last.sources} == {"none"}
        assert last.text == ask(engine, strategy="full").text
        assert last.report.control.predicted_ttft_s == pytest.approx(last.report.ttft_s, rel=0.4)
        assert last.report.control.error < 0.4

        ThrottledDisk.bytes_per_s = 1e9
        computed = ask_until(engine, "quality")[:-1]
        assert computed, "nobody could know that the disk is well again"
        assert {one.report.control.reason for one in computed} == {FULL, "probe"}
        estimates = engine.controller.estimates
        assert estimates.raised >= 1
        assert estimates.full >= 2
        assert estimates.forecasts > 10
        assert estimates.ttft_error is not None


def test_after_a_probe_blocks_lie_in_memory_and_are_blended(throttled):
    """A slow disk and fast memory: one slow load, and no full prefill any more."""
    sets = [[f"{place} {passage}" for passage in PASSAGES] for place in "abcdef"]
    with throttled() as engine:
        for passages in sets:
            ask(engine, passages=passages)
        nbytes = engine.stats().tiers[1].nbytes / len(sets)
        full_s = ask(engine, strategy="full").report.ttft_s
    ThrottledDisk.bytes_per_s = nbytes / (2 * full_s)
    with throttled(ram_bytes=2**30) as engine:

        def asked(passages):
            answer = ask(engine, passages=passages)
            deadline = time.monotonic() + 20
            while engine.store.stats().open_blocks:  # until they are copied to memory
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return answer

        # Each set is on the disk when it is asked, until the controller knows the disk.
        unread = next(p for p in sets if asked(p).report.control.reason == FULL)
        found = [asked(unread) for _ in range(6)]
        reasons = [answer.report.control.reason for answer in found]
        probe = reasons.index("probe")
        assert (reasons[:probe], reasons[probe + 1 :]) == ([FULL] * 2, ["quality"] * 3)
        tiers = [{source.tier for source in answer.sources} for answer in found]
        assert tiers == [{"none"}] * probe + [{"disk"}] + [{"ram"}] * 3
        assert {answer.report.strategy for answer in found[probe:]} == {"cacheblend"}
        assert found[-1].text == found[probe].text
        assert found[-1].report.ttft_s < found[0].report.ttft_s < found[probe].report.ttft_s


def test_the_setting_turns_it_off_and_measuring_goes_on(throttled):
    with throttled(controller=False) as engine:
        ask(engine)
        nbytes = engine.stats().tiers[1].nbytes
        ThrottledDisk.bytes_per_s = nbytes / 1.0
        controls = [ask(engine).report.control for _ in range(4)]
        assert {c.reason for c in controls} == {"fixed"}
        assert {c.ratio for c in controls} == {0.15}
        assert controls[-1].predicted_stall_s == pytest.approx(0.8, abs=0.3)


def test_predictions_change_no_bit_of_an_answer(tiny, tmp_path):
    """From memory and from a disk that is fast enough, every repetition is the same."""
    room = Room(tiny("llama", num_hidden_layers=4))
    chunks = [token_ids(60, seed=n) for n in range(4)]
    fitted = room.prefill.placed(room.prompt(chunks))
    first, *others = (
        room.prefill.run(fitted, CACHEBLEND, new_tokens=1, adapt=True) for _ in range(6)
    )
    assert others[-1].control.predicted_ttft_s > 0
    assert {one.control.reason for one in (first, *others)} == {"quality"}
    for one in others:
        assert torch.equal(one.logits, first.logits)
