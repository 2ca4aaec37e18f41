"""`kvrag bench kernels` on a tiny model: every kernel and implementation, and sane figures."""

from __future__ import annotations

import json

from kvrag import Engine, Settings
from kvrag.bench.kernels import KernelOptions, run
from tests.tiny import make_tiny_model


def test_every_kernel_is_measured(tmp_path, capsys):
    folder = make_tiny_model(tmp_path / "model", "mistral", sliding_window=32)
    settings = Settings(model=str(folder), home=tmp_path / "home", dtype="float32", threads=1)
    with Engine.open(settings) as engine:
        result = run(engine, KernelOptions(tokens=128, chunk_tokens=32, repetitions=2))
        chosen = engine.model.decoder.kernels.name
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["cases"] == result["cases"]
    assert {case["kernel"] for case in result["cases"]} == {
        "attention, full prefill",
        "attention, scattered",
        "attention, question",
        "attention received, question",
        "decode attention",
        "rotate into the cache",
        "copy into the cache",
        "deviation",
        "rms norm",
        "gated activation",
    }
    for case in result["cases"]:
        assert set(case["ms"]) == set(case["of_bound"]) == {"torch", "cpu", chosen}
        assert case["bound_rate"] > 0
        assert all(ms > 0 for ms in case["ms"].values())
    windowed = [case["shape"] for case in result["cases"] if "window 32" in case["shape"]]
    assert windowed
