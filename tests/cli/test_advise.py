"""`kvrag store advise` with a tiny model: measured and given tiers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvrag.cli.store.advise import parse_tier
from kvrag.errors import InputError


def test_the_cheapest_tier_is_named(kvrag, environment):
    tiers = ["ram=:3", "near=1000:0.5", "far=1e-9:0"]
    options = ["--tokens", 300, *(part for tier in tiers for part in ("--tier", tier))]
    result = kvrag("--set", "strategy=cacheblend", "store", "advise", *options, "--json")
    assert (result.code, result.err) == (0, "")
    advice = result.json
    ram, near, far = advice["tiers"]
    assert advice["choice"] == "near"
    assert (near["hides"], far["hides"]) == (True, False)
    assert near["bytes_per_s"] == pytest.approx(1e12)
    assert far["load_s"] == pytest.approx(advice["nbytes"] / 1)
    assert ram["bytes_per_s"] > 0
    assert (advice["tokens"], advice["strategy"], advice["ratio"]) == (300, "cacheblend", 0.15)
    # 3 layers, K and V, 2 heads of 8 in float32; headers and padding beside.
    assert advice["nbytes"] > 300 * 3 * 2 * 2 * 8 * 4
    assert advice["compute_s"] > 0
    assert advice["full_s"] > 0


def test_configured_tiers_are_measured_and_nothing_is_left(kvrag, environment):
    home = Path(environment["KVRAG_HOME"])
    home.mkdir()
    result = kvrag("store", "advise", "--tokens", 130)
    assert (result.code, result.err) == (0, "")
    for text in ("130 context tokens", "ram", "disk", "full prefill"):
        assert text in result.out
    assert "give prices" in result.out or "no tier hides" in result.out
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("redis", "has no speed; ram and disk alone are measured"),
        ("redis=:0.1", "has no speed"),
        ("=1:1", "has no speed"),
        ("disk=fast", "not of the form name=GB/s:price"),
        ("disk=1:2:3", "not of the form name=GB/s:price"),
        ("disk=0:1", "give more than 0"),
        ("disk=nan:1", "give more than 0"),
        ("disk=:-1", "give 0 or more"),
    ],
)
def test_a_tier_that_cannot_be_read(text, message):
    with pytest.raises(InputError, match=message):
        parse_tier(text)


@pytest.mark.parametrize("tokens", [0, 4096])
def test_tokens_that_the_model_does_not_hold(kvrag, environment, tokens):
    result = kvrag("store", "advise", "--tokens", tokens)
    assert result.code == 2
    assert f"tokens is {tokens}; it must lie between 1 and" in result.error
