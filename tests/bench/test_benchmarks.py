"""The benchmarks on a tiny model: their figures mean nothing here, their shape does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvrag import Engine, Settings
from kvrag.bench import fidelity, layers
from kvrag.bench.cli import app
from kvrag.bench.intervals import interval
from kvrag.bench.items import Distractors, drawn, load_items
from kvrag.bench.overlap import f1
from kvrag.errors import InputError, UnknownStrategyError
from kvrag.passages import passage_chunks
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
    ("given", "expected"),
    [
        ("fast", ["fast"]),
        ("fast:ratio=0.05", ["fast:ratio=0.05"]),
        ("fast:most_rows=0", ["fast:most_rows=0"]),
        ("fast:ratio=0.02,0.1", ["fast:ratio=0.02", "fast:ratio=0.1"]),
        (
            "fast:most_rows=0,ratio=0.02,0.1,window=8",
            ["fast:most_rows=0,ratio=0.02,window=8", "fast:most_rows=0,ratio=0.1,window=8"],
        ),
    ],
)
def test_one_strategy_at_several_ratios(given, expected):
    assert fidelity.at_ratios(given) == expected


def test_ratios_are_measured_one_by_one(engine, data):
    options = fidelity.FidelityOptions(
        items=3, new_tokens=4, strategies=("reuse", "cacheblend:ratio=0.1,0.5,1")
    )
    figures = fidelity.run(engine, [data], options)["fidelity"]["lamps"]
    names = ["reuse", *(f"cacheblend:ratio={ratio}" for ratio in ("0.1", "0.5", "1"))]
    assert list(figures) == names
    ratios = [figures[name]["effective_ratio"] for name in names]
    assert ratios == sorted(set(ratios))
    assert figures[names[-1]]["kl"] < 1e-4 < figures["reuse"]["kl"]
    for wrong in ("cacheblend:ratio=0.1,often", "cacheblend:0.1", "reuse:ratio=0.1,"):
        with pytest.raises(InputError):
            fidelity.run(engine, [data], replace(options, strategies=(wrong,)))
    with pytest.raises(UnknownStrategyError):
        fidelity.run(engine, [data], replace(options, strategies=("wish:ratio=0.1,0.2",)))


# ---- longer contexts -----------------------------------------------------------------------------


def tokens_of(engine, item):
    return [len(c.token_ids) for c in passage_chunks(item.passages, engine.model.tokenizer)]


def test_shorter_contexts_are_longer_ones_with_passages_left_out(engine, data):
    items = load_items(data, "all")
    distractors = Distractors(items, engine.model.tokenizer, seed=0)
    firsts = set()
    for item in items:
        own = sum(tokens_of(engine, item))
        contexts = [distractors.lengthened(item, own + more) for more in (0, 200, 500)]
        assert contexts[0] == item
        assert distractors.lengthened(item, 1) == item
        for longer, shorter in zip(contexts[1:], contexts, strict=False):
            assert len(longer.passages) > len(shorter.passages)
            kept = [p for p in longer.passages if p in shorter.passages]
            assert kept == list(shorter.passages)
        texts = [passage["text"] for passage in contexts[-1].passages]
        assert len(set(texts)) == len(texts)
        sizes = tokens_of(engine, contexts[-1])
        assert own + 500 - 2 * max(sizes) < sum(sizes) <= own + 500
        firsts.add(contexts[-1].passages[0] == item.passages[0])
        again = Distractors(items, engine.model.tokenizer, seed=0)
        assert again.lengthened(item, own + 500) == contexts[-1]
    assert firsts == {True, False}, "distractors stand in front, too, and not always"
    with pytest.raises(InputError, match=r"context of 99999 tokens cannot be filled.* 'q0'"):
        distractors.lengthened(items[0], 99999)


def test_lengths_are_measured_with_the_same_items(engine, data, capsys, tmp_path):
    options = fidelity.FidelityOptions(
        items=3, half="all", new_tokens=4, strategies=("reuse", "full"), plot=tmp_path
    )
    plain = fidelity.run(engine, [data], options)
    longer = fidelity.run(engine, [data], replace(options, context_tokens=(600, 1, 300)))
    assert list(longer["fidelity"]) == ["lamps@1", "lamps@300", "lamps@600"]
    full = longer["full"]
    assert "context_tokens" not in plain["full"]["lamps"]
    assert [full[name]["context_tokens"] for name in full] == [1, 300, 600]
    # Own passages are never left out.
    assert full["lamps@1"]["prompt_tokens"] == plain["full"]["lamps"]["prompt_tokens"]
    around = full["lamps@600"]["prompt_tokens"] - full["lamps@300"]["prompt_tokens"]
    assert around == pytest.approx(300, abs=60)
    for name in ("kl", "dnll_mean"):
        assert longer["fidelity"]["lamps@1"]["reuse"][name] == pytest.approx(
            plain["fidelity"]["lamps"]["reuse"][name], abs=1e-5
        )
        assert abs(longer["fidelity"]["lamps@600"]["full"][name]) < 1e-4
    assert "600" in capsys.readouterr().out


def test_lengths_that_cannot_be_measured_are_refused(engine, data, monkeypatch):
    with pytest.raises(InputError, match="they must be 1 or more"):
        fidelity.FidelityOptions(context_tokens=(100, 0))
    options = fidelity.FidelityOptions(
        items=2, half="all", strategies=("reuse",), context_tokens=(600,), new_tokens=4000
    )
    with pytest.raises(InputError, match="600 tokens does not leave room"):
        fidelity.run(engine, [data], options)
    for given in ("100,many", "100,", ""):
        with pytest.raises(InputError, match="give whole numbers, as in"):
            app(
                ["fidelity", str(data), "--context-tokens", given],
                obj=engine.settings,
                standalone_mode=False,
            )
    seen = []
    monkeypatch.setattr(fidelity, "run", lambda engine, paths, options: seen.append(options))
    words = ["--context-tokens", "1024,4096", "--strategy", "fast:ratio=0.02,0.1"]
    app(["fidelity", str(data), *words], obj=engine.settings, standalone_mode=False)
    assert seen == [
        fidelity.FidelityOptions(context_tokens=(1024, 4096), strategies=("fast:ratio=0.02,0.1",))
    ]


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
        return {item.group for item in load_items(data, half)}

    assert groups("even") | groups("odd") == groups("all")
    assert not groups("even") & groups("odd")


def test_drawn_items_are_the_same_for_the_same_seed(data):
    items = load_items(data, "all")
    assert drawn(items, 5, 0) == drawn(items, 99, 0)[:5]
    assert drawn(items, 5, 0) != drawn(items, 5, 1)
    assert sorted(i.id for i in drawn(items, 99, 0)) == sorted(i.id for i in items)


def test_intervals_hold_the_mean_and_widen_with_groups():
    values, own = [0.0, 0.0, 1.0, 1.0] * 5, [str(n) for n in range(20)]
    by_item = interval(values, own)
    by_group = interval(sorted(values), ["a"] * 10 + ["b"] * 10)
    assert by_item["low"] <= by_item["mean"] == 0.5 <= by_item["high"]
    assert by_group["high"] - by_group["low"] > by_item["high"] - by_item["low"]


def test_data_of_another_form_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question": "Where?"}')
    with pytest.raises(InputError, match=r"odd\.jsonl"):
        load_items(path, "odd")
    with pytest.raises(InputError, match="cannot be read"):
        load_items(tmp_path / "none.jsonl", "odd")


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
