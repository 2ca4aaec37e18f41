"""The TTFT benchmark on a tiny model: its figures mean nothing here, their shape does."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from kvrag import Engine, Settings
from kvrag.answer import Report, Spans, TokenCounts
from kvrag.bench import peers, plots, ttft, ttft_result
from kvrag.bench.cli import app
from kvrag.bench.contestants import Measured
from kvrag.bench.peers import PeerOption, Timing, peer_option
from kvrag.bench.prompts import Prompts
from kvrag.errors import InputError, MissingExtraError, UnknownStrategyError
from tests.tiny import make_tiny_model

FAKE = Path(__file__).with_name("fake_adapter.py")
SMALL = {"chunk_tokens": 24, "repetitions": 2, "new_tokens": 3}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("ttft")
    folder = make_tiny_model(root / "model")
    settings = Settings(
        model=str(folder), home=root / "home", dtype="float32", threads=1, strategy="cacheblend"
    )
    with Engine.open(settings) as engine:
        yield engine


@pytest.fixture
def fake_peers(monkeypatch):
    for name in peers.PEERS:
        monkeypatch.setitem(peers.PEERS, name, FAKE)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_every_contestant_is_in_the_last_line(engine, capsys):
    result = ttft.run(engine, ttft.TtftOptions(contexts=(72,), **SMALL))
    last = last_line(capsys)
    assert {name: last[name] for name in result} == json.loads(json.dumps(result))
    names = {"transformers", "full", "reuse", "cacheblend", "true"}
    assert set(last["ttft_s"]) == set(last["decode_ms"]) == names | {"default"}
    assert set(last["speedup_over_full"]) == set(last["tokens_as_full"]) == names
    assert last["default_strategy"] == "cacheblend"
    assert last["ttft_s"]["default"] == last["ttft_s"]["cacheblend"]
    assert last["context_tokens"] == 72
    assert last["cache_state"] == "ram"
    assert last["requested_ratio"] == 0.15
    assert 0 < last["effective_ratio"] < 1
    # The same weights and the same ids: float32 on both sides.
    assert last["tokens_as_full"]["transformers"] == 3
    assert last["skipped"] == {}
    assert not {"lengths", "exponents"} & last.keys(), "there is one length"
    assert last["environment"]["threads"] == 1


def test_peers_answer_and_those_that_fail_are_skipped_with_a_reason(engine, capsys, fake_peers):
    options = ttft.TtftOptions(
        contexts=(48,),
        strategies=("reuse",),
        baseline=False,
        peers=tuple(
            peer_option(text)
            for text in (
                f"vllm={sys.executable}",
                f"vllm:float16={sys.executable}",
                "kvboost=/nowhere/python",
            )
        ),
        peer_timeout_s=60,
        **SMALL,
    )
    ttft.run(engine, options)
    table, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
    last = json.loads(line)
    # What failed on the way has no figures: it answered fewer prompts than the others.
    ours = {"reuse", "cacheblend"}
    assert set(last["ttft_range_s"]) == ours | {"vllm", "vllm, prefix cached"}
    assert last["skipped"].keys() == {"vllm:float16", "kvboost"}
    assert "two prompts were enough" in last["skipped"]["vllm:float16"]
    assert "/nowhere/python" in last["skipped"]["kvboost"]
    assert table.count("skipped") == 2
    # Nothing but the peer's cold prompts computes everything.
    assert last["speedup_over_full"]["vllm"] == 1.0


def test_lengths_come_with_exponents_and_pictures(engine, capsys, tmp_path):
    options = ttft.TtftOptions(
        contexts=(96, 48), strategies=("full",), baseline=False, plot=tmp_path / "plots", **SMALL
    )
    ttft.run(engine, options)
    last = last_line(capsys)
    # The longest is told by the names that it has where it is the only one, and nowhere else.
    assert last["context_tokens"] == 96
    assert list(last["lengths"]) == ["48"]
    assert last["lengths"]["48"].keys() < last.keys()
    assert not {"dtype", "model", "threads", "skipped"} & last["lengths"]["48"].keys()
    assert last["exponents"].keys() == {"full", "cacheblend", "default"}
    for name, exponent in last["exponents"].items():
        ratio = last["ttft_s"][name] / last["lengths"]["48"]["ttft_s"][name]
        assert exponent == pytest.approx(math.log2(ratio), abs=1e-3)
    for stem in ("ttft_by_context", "ttft_spans"):
        png, svg = (tmp_path / "plots" / f"{stem}.{kind}" for kind in ("png", "svg"))
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "cacheblend" in svg.read_text()


def test_no_prompt_begins_like_another(engine):
    draw = Prompts(engine.model.tokenizer, pool=6, chunk_tokens=16, seed=0)
    prompts = [draw.next(4) for _ in range(6)]
    assert all(set(draw.tokens(prompt.passages)) == {16} for prompt in prompts)
    assert all(len(set(prompt.passages)) == 4 for prompt in prompts)
    assert len({prompt.passages[0] for prompt in prompts}) == 6
    assert len({q for prompt in prompts for q in (prompt.question, prompt.follow_up)}) == 12
    with pytest.raises(InputError, match="6 passages"):
        draw.next(4)


def test_options_that_cannot_be_measured_are_refused(engine, monkeypatch):
    with pytest.raises(InputError, match=r"context is 100 tokens; .* multiple of 24"):
        ttft.TtftOptions(contexts=(48, 100), chunk_tokens=24)
    with pytest.raises(InputError, match="vllm, vllm; each may be given once"):
        ttft.TtftOptions(peers=(peer_option("vllm=a"), peer_option("vllm=b")))
    with pytest.raises(InputError, match="4096"):
        ttft.run(engine, ttft.TtftOptions(contexts=(24, 24 * 200), baseline=False, **SMALL))
    with pytest.raises(UnknownStrategyError, match="wish"):
        ttft.run(engine, ttft.TtftOptions(contexts=(24,), strategies=("wish",), **SMALL))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"kvrag\[bench\]"):
        ttft.run(engine, ttft.TtftOptions(contexts=(24,), plot=Path("plots"), **SMALL))


def test_the_command_line_says_what_is_measured(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(ttft, "run", lambda engine, options: seen.append(options))
    words = "ttft --context 512 --context 256 --strategy reuse --no-baseline --ratio 0.3"
    peer_words = [
        "--peer",
        "vllm:bfloat16=/a b/python",
        "--peer-timeout",
        "7",
        "--plot",
        "pictures",
    ]
    arguments = [*words.split(), *peer_words]
    app(arguments, obj=engine.settings, standalone_mode=False)
    app(["ttft"], obj=engine.settings, standalone_mode=False)
    assert seen == [
        ttft.TtftOptions(
            contexts=(512, 256),
            strategies=("reuse",),
            baseline=False,
            ratio=0.3,
            peers=(PeerOption("vllm:bfloat16", "vllm", "bfloat16", "/a b/python"),),
            peer_timeout_s=7,
            plot=Path("pictures"),
        ),
        ttft.TtftOptions(),
    ]


# ---- from answers to figures ---------------------------------------------------------------------


def measured(seconds, ids=(1, 2, 3), spans=None, *, same_question=True):
    report = None
    if spans is not None:
        report = Report("x", seconds, 0.5, True, TokenCounts(0, 0, 0, 0), Spans(0.0, *spans, 0.0))
    timing = Timing(seconds, 0.01, ids)
    return Measured(timing, report, frozenset({"ram"}), same_question=same_question)


def test_figures_are_medians_over_the_fastest_full_prefill():
    found = ttft_result.figures(
        {
            "full": [measured(4.0, spans=(0, 0, 4)), measured(6.0, spans=(0, 0, 6))],
            "peer": [measured(2.0, (1, 2, 9)), measured(3.0, (7,))],
            "peer, prefix cached": [measured(0.5, same_question=False)] * 2,
            "reuse": [measured(0.5, spans=(0.4, 0.1, 0.3))] * 2,
        },
        computing_all=["full", "peer"],
        default="reuse",
    )
    assert found["ttft_s"] | {"default": None} == {
        "full": 5.0,
        "peer": 2.5,
        "peer, prefix cached": 0.5,
        "reuse": 0.5,
        "default": None,
    }
    assert found["ttft_range_s"]["peer"] == (2.0, 3.0)
    assert found["speedup_over_full"] == {
        "full": 0.5,
        "peer": 1.0,
        "peer, prefix cached": 5.0,
        "reuse": 5.0,
    }
    assert found["tokens_as_full"] == {"full": 3, "peer": 1, "reuse": 3}
    assert found["decode_ms"]["default"] == pytest.approx(10)
    assert found["stall_s"] == 0.1


def test_spans_add_up_to_the_ttft():
    # Loading hid behind 0.3 s of computing; two reads at a time hid no more than there was.
    for load, hidden in ((0.4, 0.3), (9.0, 0.5)):
        report = measured(1.0, spans=(load, 0.1, 0.5)).report
        found = ttft_result.spans([report, report])
        assert found == pytest.approx(
            {"compute_loading": hidden, "compute": 0.5 - hidden, "stall": 0.1, "other": 0.4}
        )


def test_exponents_are_slopes_of_logarithms():
    lengths = {
        n: {
            "context_tokens": n,
            "ttft_s": {"a": 3 * n**1.5, "b": 7.0} | ({"c": 1} if n < 2 else {}),
        }
        for n in (1, 2, 8)
    }
    assert ttft_result.exponents(lengths) == {"a": 1.5, "b": 0.0}


def test_the_same_figures_give_the_same_pictures(tmp_path):
    figures = {
        "ttft_s": {"a": 1.0, "b": 2.0, "c, prefix cached": 0.1},
        "ttft_range_s": {"a": (0.9, 1.1), "b": (2.0, 2.0), "c, prefix cached": (0.1, 0.1)},
        "spans_s": {"a": {"compute": 0.5, "compute_loading": 0.2, "stall": 0.2, "other": 0.1}},
        "context_tokens": 64,
    }
    facts = {"threads": 2, "dtype": "float32", "model": "folder/name", "repetitions": 3}
    drawn = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        files = [
            *plots.plot_lengths(folder, {64: figures}, facts),
            *plots.plot_spans(folder, figures, facts),
        ]
        drawn.append([file.read_bytes() for file in files])
        assert [file.suffix for file in files] == [".png", ".svg"] * 2
    assert drawn[0] == drawn[1]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        plots.plot_spans(tmp_path / "file", figures, facts)
