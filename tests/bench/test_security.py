"""`kvrag bench sealing` and `tenants`: every case is measured, and the statistics are right."""

from __future__ import annotations

import json
import random

import pytest

from kvrag.bench import sealing, tenants


def printed(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_sealing_is_measured_beside_plain(capsys):
    pytest.importorskip("cryptography", reason="the extra encryption is not installed")
    result = sealing.run(sealing.SealingOptions(layers=2, layer_nbytes=5000, repetitions=3))
    assert printed(capsys)["gb_per_cpu_s"] == result["gb_per_cpu_s"]
    assert set(result["gb_per_cpu_s"]) == {
        *(f"{act}, {how}" for act in ("read", "write") for how in ("plain", "sealed")),
        "cipher alone",
    }
    assert all(rate > 0 for rate in result["gb_per_cpu_s"].values())
    assert result["sealed_times_plain"]["read"] > 1


def test_tenants_are_measured(capsys):
    result = tenants.run(tenants.TenantsOptions(texts=40, tokens=16, repetitions=5))
    assert printed(capsys)["advantage"] == result["advantage"]
    assert set(result["advantage"]) == {"another's", "own"}
    assert all(0 <= seen <= 0.5 for seen in result["advantage"].values())
    assert set(result["median_us"]) == {"another's", "nobody's", "own"}
    assert all(taken > 0 for taken in result["median_us"].values())


def test_advantage_is_that_of_all_pairs():
    rng = random.Random(5)
    one = [rng.randrange(20) for _ in range(60)]
    other = [rng.randrange(4, 24) for _ in range(70)]
    larger = sum((a > b) + (a == b) / 2 for a in one for b in other) / (60 * 70)
    assert tenants.advantage(one, other) == pytest.approx(abs(larger - 0.5))
    assert tenants.advantage(one, one) == pytest.approx(0)
    assert tenants.advantage([1, 2], [3, 4]) == tenants.advantage([3, 4], [1, 2]) == 0.5
