"""The benchmarks on a tiny model: their figures mean nothing here, their shape does."""

from __future__ import annotations

import json

import pytest

from kvrag import Engine, Settings
from kvrag.bench import fidelity, layers, ttft
from kvrag.bench.controls import NearestBlend, RandomBlend
from kvrag.errors import InputError
from kvrag.fusion import create
from tests.tiny import make_tiny_model

PLACES = ("Karsk", "Orrel", "Vessin", "Kelvane")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    folder = make_tiny_model(root / "model")
    settings = Settings(model=str(folder), home=root / "home", dtype="float32", threads=1)
    with Engine.open(settings) as engine:
        yield engine


@pytest.fixture
def data(tmp_path):
    lines = [
        {
            "id": f"q{n}",
            "group": f"g{n // 2}",
            "question": f"Where is lamp {n}?",
            "answers": [PLACES[n % 4]],
            "passages": [{"title": p, "text": f"Lamp {n} of {p}. " * 3} for p in PLACES],
        }
        for n in range(12)
    ]
    path = tmp_path / "lamps.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_ttft_reports_every_contestant_and_ends_with_json(engine, capsys):
    options = ttft.TtftOptions(chunks=3, chunk_tokens=24, repetitions=2, new_tokens=3)
    result = ttft.run(engine, options)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: last[name] for name in result} == result
    names = {"transformers", "full", "reuse", "cacheblend"}
    assert set(last["ttft_s"]) == set(last["decode_ms"]) == names
    assert last["context_tokens"] == 72
    assert last["cache_state"] == "ram"
    assert 0 < last["effective_ratio"] < 1


def test_prompts_repeat_no_prefix(engine):
    draw = ttft._Prompts(engine.model.tokenizer, ttft.TtftOptions(chunks=4, chunk_tokens=16))
    firsts = [draw.next() for _ in range(3)]
    assert all(set(draw.tokens(passages)) == {16} for passages, _ in firsts)
    assert len({question for _, question in firsts}) == 3
    assert len({tuple(passages) for passages, _ in firsts}) == 3


def test_full_prefill_measured_against_itself_is_no_distance(engine, data, capsys, monkeypatch):
    monkeypatch.setattr(
        fidelity,
        "_strategies",
        lambda options: {"full": create("full"), "blend 1": create("cacheblend", 1.0)},
    )
    result = fidelity.run(engine, data, fidelity.FidelityOptions(items=4, new_tokens=5))
    for name in ("full", "blend 1"):
        for metric in ("kl", "kl_first", "nll_abs_difference"):
            assert abs(result["strategies"][name][metric]["mean"]) < 1e-4, (name, metric)
    json.loads(capsys.readouterr().out.splitlines()[-1])


def test_halves_never_share_a_group(data):
    def groups(half):
        options = fidelity.FidelityOptions(items=99, half=half)
        return {item.group for item in fidelity.load_items(data, options)}

    assert groups("even") | groups("odd") == groups("all")
    assert not groups("even") & groups("odd")


def test_intervals_hold_the_mean_and_widen_with_groups():
    values, own = [0.0, 0.0, 1.0, 1.0] * 5, [str(n) for n in range(20)]
    by_item = fidelity.interval(values, own)
    by_group = fidelity.interval(sorted(values), ["a"] * 10 + ["b"] * 10)
    assert by_item["low"] <= by_item["mean"] == 0.5 <= by_item["high"]
    assert by_group["high"] - by_group["low"] > by_item["high"] - by_item["low"]


def test_data_of_another_form_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question": "Where?"}')
    with pytest.raises(InputError, match=r"odd\.jsonl"):
        fidelity.load_items(path, fidelity.FidelityOptions())
    with pytest.raises(InputError, match="cannot be read"):
        fidelity.load_items(tmp_path / "none.jsonl", fidelity.FidelityOptions())


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """An engine whose model has a global layer and two that see the last 24 tokens."""
    root = tmp_path_factory.mktemp("windowed")
    windows = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    folder = make_tiny_model(root / "model", family="qwen2", **windows)
    settings = Settings(model=str(folder), home=root / "home", dtype="float32", threads=1)
    with Engine.open(settings) as engine:
        yield engine


def test_layers_mended_from_none_to_all_span_reuse_to_full_prefill(windowed, data, capsys):
    options = fidelity.FidelityOptions(items=4, new_tokens=5)
    result = layers.run(windowed, data, options)
    json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["windows"] == [None, 24, 24]
    # Layer 0 depends on the token alone.
    assert result["deviation_k"][0] < 1e-9 < result["deviation_k"][1]
    assert result["deviation_v"][0] < 1e-9 < result["deviation_v"][1]
    kl = {name: interval["mean"] for name, interval in result["kl"].items()}
    assert abs(kl["all layers"]) < 1e-5
    assert kl["global layers"] == kl["layer 0"]
    # The stored KV that it mixes in is the one that the store hands to plain reuse.
    reuse = fidelity.run(windowed, data, options)["strategies"]["reuse"]["kl"]["mean"]
    assert kl["no layer (reuse)"] == pytest.approx(reuse, abs=1e-5)


def test_random_control_is_no_strategy_for_users(engine):
    passages = [f"Lamp of {place}. " * 4 for place in PLACES]
    engine.answer("Where?", passages=passages, strategy="reuse", max_tokens=1)
    answer = engine.answer(
        "Where?", passages=passages, strategy=RandomBlend(ratio=0.5), max_tokens=1
    )
    assert answer.report.strategy == "random"
    assert answer.report.tokens.recomputed > 0
    with pytest.raises(InputError, match="cacheblend, full, reuse"):
        engine.answer("Where?", passages=passages, strategy="random")


def test_nearest_control_keeps_the_rows_before_the_question(engine):
    passages = [f"Lamp of {place}. " * 4 for place in PLACES]
    prefilled = engine.prefill(
        "Where?", passages=passages, strategy=NearestBlend(ratio=0.25), new_tokens=1
    )
    prompt = prefilled.prompt
    assert 0 < prefilled.tokens.recomputed < prompt.context_tokens
    assert prefilled.tokens.recomputed <= len(prompt.chunks[-1].token_ids)
