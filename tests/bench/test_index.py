"""`bench index`: figures of small indexes, what it prints, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvrag.bench import index
from kvrag.bench.index import IndexOptions, noisy, run
from kvrag.errors import InputError
from kvrag.retrieval.vectors import ivfpq
from tests.bench.test_retrieval import folder  # noqa: F401  # a fixture
from tests.tiny import make_tiny_embedder


def test_noise_does_not_depend_on_how_many_rows_are_asked_for():
    vectors = np.eye(8, dtype=np.float32)
    rows = noisy(vectors, 0, 20, 0.3, seed=0)
    np.testing.assert_array_equal(noisy(vectors, 0, 20, 0.3, seed=0), rows)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert np.argmax(rows, axis=1).tolist() == [number % 8 for number in range(20)]
    away = 1 - (rows * vectors[np.arange(20) % 8]).sum(axis=1)
    assert 0.3**2 / 8 < away.mean() < 0.3**2  # an angle of about 0.3
    assert not np.array_equal(noisy(vectors, index._BATCH, 8, 0.3, seed=0), rows[:8])


def test_what_it_prints(folder, capsys, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(index, "LEAST_VECTORS", 400)
    monkeypatch.setattr(index, "_BATCH", 128)
    monkeypatch.setattr(ivfpq, "_ROTATION_ROUNDS", 1)
    embedder = str(make_tiny_embedder(folder / "embedder"))
    options = IndexOptions((300, 500), keep=tmp_path / "kept", plot=tmp_path / "plot")
    result = run(folder, embedder, options)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["points"] == result["points"]
    kinds = [(p["kind"], p["vectors"], p["chosen"]) for p in result["points"]]
    first = [("flat", 300, "all"), ("hnsw", 300, "default"), ("hnsw", 300, "even half")]
    assert kinds[:3] == first
    assert kinds[6:] == [("ivfpq", 500, "default"), ("ivfpq", 500, "even half")]
    for point in result["points"]:
        assert point["recall@10"] >= (1.0 if point["kind"] == "flat" else 0.5)
        assert point["p95_ms"] >= point["p50_ms"] > 0
    assert {path.name for path in (tmp_path / "plot").iterdir()} == {
        "index_growth.png",
        "index_growth.svg",
    }
    assert len(list((tmp_path / "kept").glob("*.npy"))) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [({"sizes": (100, 50)}, "rise"), ({"sizes": ()}, "rise"), ({"kinds": ("lsh",)}, "'lsh'")],
)
def test_options_that_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        IndexOptions(**options)
