"""The pipeline benchmark on a tiny model: where its blocks lie is what each run is told."""

from __future__ import annotations

import json

import pytest

from kvrag import Engine, Settings
from kvrag.bench import pipeline
from kvrag.errors import InputError
from tests.tiny import make_tiny_model

OPTIONS = pipeline.PipelineOptions(chunks=4, chunk_tokens=24, repetitions=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("pipeline") / "model")


def open_engine(folder, home, **settings):
    return Engine.open(Settings(model=str(folder), home=home, dtype="float32", **settings))


def test_every_strategy_from_every_place(folder, tmp_path, capsys):
    with open_engine(folder, tmp_path / "home", strategy="full") as engine:
        result = pipeline.run(engine, OPTIONS)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: last[name] for name in result} == result
    rows = {(row["strategy"], row["blocks"]): row for row in result["rows"]}
    states = [state for state, _, _ in pipeline.STATES]
    assert list(rows) == [(s, state) for s in ("reuse", "cacheblend", "full") for state in states]
    tiers = {"ram": {"ram"}, "disk, cached": {"disk"}, "disk, cold": {"disk"}}
    for (strategy, state), row in rows.items():
        wanted = set() if strategy == "full" else tiers.get(state, {"ram", "disk"})
        assert set(row["gb_s"]) == wanted
        assert 0 <= row["hidden"] <= 1
        assert row["ttft_s"] > 0
        # The first run of a kind has nothing to go by; one repetition has no second.
        assert row["predicted_stall_s"] is None or row["predicted_stall_s"] >= 0
    assert any(row["predicted_ttft_s"] for row in rows.values())
    assert result["context_tokens"] == 96
    assert result["storage_gb_s"] > 0


def test_blocks_lie_where_they_are_laid(folder, tmp_path):
    with open_engine(folder, tmp_path / "home") as engine:
        bench = pipeline._Pipeline(engine, OPTIONS)
        for share, near in ((0.0, 0), (0.5, 2), (1.0, 4), (0.0, 0)):
            bench.lay(share, cold=False)
            tiers = bench.run("reuse").prefilled.tiers
            assert tiers == ("ram",) * near + ("disk",) * (4 - near)


def test_memory_that_cannot_hold_the_blocks_is_refused(folder, tmp_path):
    with (
        open_engine(folder, tmp_path / "home", ram_bytes=4096) as engine,
        pytest.raises(InputError, match="ram_bytes is 4096"),
    ):
        pipeline.run(engine, OPTIONS)
