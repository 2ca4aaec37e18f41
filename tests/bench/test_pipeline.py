"""The pipeline benchmark on a tiny model: where its blocks lie is what each run is told."""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack

import pytest

from kvrag import Engine, Settings
from kvrag.bench import pipeline
from kvrag.errors import InputError
from kvrag.store.residency import cached_share
from tests.tiny import make_tiny_model

OPTIONS = pipeline.PipelineOptions(chunks=4, chunk_tokens=24, repetitions=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("pipeline") / "model")


def open_engine(folder, home, **settings):
    return Engine.open(Settings(model=str(folder), home=home, dtype="float32", **settings))


def test_every_strategy_from_every_place(folder, tmp_path, capsys):
    options = dataclasses.replace(OPTIONS, strategies=("reuse", "cacheblend", "full"))
    with open_engine(folder, tmp_path / "home") as engine:
        result = pipeline.run([engine], options)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: last[name] for name in result} == result
    assert {(row["codec"], row["ttft_ratio"]) for row in result["rows"]} == {("raw", 1.0)}
    rows = {(row["strategy"], row["blocks"]): row for row in result["rows"]}
    states = list(pipeline.STATES)
    assert list(rows) == [(s, state) for s in ("reuse", "cacheblend", "full") for state in states]
    tiers = {"ram": {"ram"}, "first half ram, then cold": {"ram", "disk"}}
    for (strategy, state), row in rows.items():
        wanted = set() if strategy == "full" else tiers.get(state, {"disk"})
        assert set(row["gb_s"]) == wanted
        assert 0 <= row["hidden"] <= 1
        assert row["ttft_s"] > 0
        # The warm-up has shown what each kind needs.
        assert row["predicted_stall_s"] >= 0
        assert row["predicted_ttft_s"] > 0
        assert row["ttft_error"] >= 0
        assert row["stall_error"] >= 0
    assert result["context_tokens"] == 96
    assert result["storage_gb_s"] > 0


def test_codecs_side_by_side(folder, tmp_path):
    codecs, states = ("raw", "int8", "int4"), ("ram", "disk, cold")
    options = dataclasses.replace(OPTIONS, strategies=("reuse",), states=states, warm_up=0)
    with ExitStack() as opened:
        engines = [
            opened.enter_context(open_engine(folder, tmp_path / codec, codec=codec))
            for codec in codecs
        ]
        result = pipeline.run(engines, options)
    rows = {(row["blocks"], row["codec"]): row for row in result["rows"]}
    assert list(rows) == [(state, codec) for state in states for codec in codecs]
    assert set(result["kv_bytes"]) == set(codecs)
    assert all(row["ttft_ratio"] > 0 and row["gb_s"] for row in rows.values())
    assert {rows[state, "raw"]["ttft_ratio"] for state in states} == {1.0}


def test_blocks_lie_where_they_are_laid(folder, tmp_path):
    with open_engine(folder, tmp_path / "home") as engine:
        bench = pipeline._Pipeline(engine, OPTIONS)
        paths = {path.stem: path for path in bench._files()}
        for state, place in pipeline.STATES.items():
            bench.lay(state)
            for index, block in enumerate(bench.blocks):
                with paths[block.header.key.digest].open("rb") as file:
                    share = cached_share(file.fileno(), 0, block.nbytes)
                assert share in {None, 0.0 if place(index, 4) == "cold" else 1.0}
            tiers = bench.run("reuse").tiers
            assert tiers == tuple("ram" if place(i, 4) == "ram" else "disk" for i in range(4))


def test_an_unknown_place_is_refused():
    with pytest.raises(InputError, match="tape"):
        pipeline.PipelineOptions(states=("tape",))


def test_memory_that_cannot_hold_the_blocks_is_refused(folder, tmp_path):
    with (
        open_engine(folder, tmp_path / "home", ram_bytes=4096) as engine,
        pytest.raises(InputError, match="ram_bytes is 4096"),
    ):
        pipeline.run([engine], OPTIONS)
