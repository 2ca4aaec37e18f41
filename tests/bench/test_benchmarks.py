"""The benchmarks on a tiny model: their figures mean nothing here, their shape does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvrag import Engine, Settings
from kvrag.bench import fidelity, layers
from kvrag.bench.overlap import f1
from kvrag.errors import InputError
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


def test_full_prefill_measured_against_itself_is_no_distance(engine, data, capsys):
    options = fidelity.FidelityOptions(
        items=4, new_tokens=5, strategies=("full", "cacheblend:ratio=1", "true:ratio=1")
    )
    result = fidelity.run(engine, [data], options)
    for name in options.strategies:
        for metric in ("kl", "kl_first", "dnll_abs"):
            assert abs(result["fidelity"]["lamps"][name][metric]) < 1e-4, (name, metric)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fidelity"].keys() == {"lamps"}


def test_every_strategy_of_the_table_has_every_figure(engine, data, tmp_path):
    options = fidelity.FidelityOptions(items=3, new_tokens=4, answers=True, plot=tmp_path / "plots")
    result = fidelity.run(engine, [data], options)
    for name, figures in result["fidelity"]["lamps"].items():
        assert figures.keys() == {*fidelity.METRICS, "ttft_s", "effective_ratio", "n", "ci95"}, name
        assert figures["n"] == 3
        assert all(low <= figures[m] <= high for m, (low, high) in figures["ci95"].items())
    assert [Path(file).stat().st_size > 1000 for file in result["plots"]] == [True, True]


def test_another_corpus_prefix_is_measured_as_one(engine, data):
    def kl(other_prefix):
        options = fidelity.FidelityOptions(
            items=3, new_tokens=4, strategies=("reuse",), other_prefix=other_prefix
        )
        result = fidelity.run(engine, [data], options)
        return result["prefix_match"], result["fidelity"]["lamps"]["reuse"]["kl"]

    match, own = kl(None)
    other_match, other = kl("Quite another text that stood before the chunks.")
    assert (match, other_match) == (True, False)
    assert own != other


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("The lamp of Karsk.", ["lamp of karsk"], 1.0),
        ("Karsk", ["Orrel"], 0.0),
        ("in Karsk", ["Orrel", "Karsk"], 2 / 3),
        ("", ["Karsk"], 0.0),
        ("Karsk Karsk", ["Karsk"], 2 / 3),
    ],
)
def test_f1_of_words(answer, golds, expected):
    assert f1(answer, golds) == pytest.approx(expected)


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
    reuse = fidelity.run(windowed, [data], replace(options, strategies=("reuse",)))
    assert kl["no layer (reuse)"] == pytest.approx(
        reuse["fidelity"]["lamps"]["reuse"]["kl"], abs=1e-5
    )
