"""`bench eviction`: traces, and the shape of what it prints; figures are for real runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvrag import Engine, Settings
from kvrag.bench import eviction
from kvrag.bench.items import Item
from kvrag.bench.traces import CONTESTANTS, Use, replay, retrieval_trace, zipf_trace
from tests.tiny import make_tiny_model


def test_the_made_up_trace():
    trace = zipf_trace(1000, blocks=50, bytes_per_token=10, seed=1)
    assert trace == zipf_trace(1000, blocks=50, bytes_per_token=10, seed=1)
    assert len(trace) == 1200
    scanned = [use.number for use in trace if use.number >= 50]
    assert len(scanned) == len(set(scanned)) == 200
    assert all(use.nbytes == 10 * use.tokens and 32 <= use.tokens <= 256 for use in trace)
    counts = np.bincount([use.number for use in trace if use.number < 50])
    assert counts[0] > counts[10:].max()


def test_the_trace_of_real_retrieval():
    """The order of questions, and within one that of scores."""

    class Letters:
        def embed_documents(self, texts):
            return np.array([[text.count("a"), text.count("b")] for text in texts], np.float32)

        def embed_query(self, text):
            return self.embed_documents([text])[0]

    passages = tuple({"title": letter, "text": letter * 2} for letter in "abz")
    items = [Item(q, q, q, (), passages) for q in ("bbb", "a")]
    trace = retrieval_trace(items, Letters(), [5, 6, 7], k=2, bytes_per_token=3)
    assert [use.number for use in trace] == [1, 0, 0, 1]
    assert trace[0] == Use(1, 18, 6)


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_a_replay_counts_hits_and_tokens(contestant):
    uses = [Use(number, 10, 1 + number) for number in (0, 1, 0, 1, 0)]
    rates = replay(uses, contestant, 100)
    hits = 1 if "second" in contestant else 3
    assert rates.hits == hits / 5
    assert rates.tokens == (1 if hits == 1 else 4) / 7
    assert replay(uses, contestant, 0).hits == 0


def test_what_it_prints(tmp_path, capsys):
    settings = Settings(
        model=str(make_tiny_model(tmp_path / "model")), home=tmp_path / "home", dtype="float32"
    )
    options = eviction.EvictionOptions(
        uses=200, catalog=30, shares=(0.2,), blocks=(50,), operations=20
    )
    with Engine.open(settings) as engine:
        result = eviction.run(engine, [], options)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(printed["hit_rates"]["zipf with scans"]["0.2"]) == set(CONTESTANTS)
    assert [point["policy"] for point in result["curve"]] == ["lru", "lfu", "cost", "s3-fifo"]
    for point in result["curve"]:
        assert point["put_us"] > 0
        assert point["get_us"] > 0
        assert point["bytes_per_block"] > 0


@pytest.mark.parametrize("policy", ["lru", "s3-fifo"])
def test_a_block_takes_less_than_400_bytes(policy):
    """Half of them a corpus's, and with all that the store keeps beside its tiers."""
    options = eviction.EvictionOptions(operations=5, blocks=(5000,))
    (point,) = eviction._curve(policy, options)
    assert point["bytes_per_block"] < 400
