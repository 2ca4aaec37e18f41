"""`kvrag bench precompute`: the job beside the model, over a tiny one."""

from __future__ import annotations

import json

import pytest

from kvrag import Engine, Settings
from kvrag.bench import precompute
from tests.tiny import make_tiny_embedder, make_tiny_model

pytest.importorskip("faiss", reason="documents need the extra kvrag[retrieval]")


def test_the_job_is_measured_beside_the_model(tmp_path, capsys):
    settings = Settings(
        model=str(make_tiny_model(tmp_path / "model")),
        embedder=str(make_tiny_embedder(tmp_path / "embedder")),
        home=tmp_path / "home",
        dtype="float32",
        threads=1,
    )
    options = precompute.PrecomputeOptions(documents=3, tokens=24, joined=2, repetitions=2)
    with Engine.open(settings) as engine:
        result = precompute.run(engine, options)
        assert engine.counts().documents == 9
        assert engine.counts().blocks == 9 * len(engine.corpus_prefixes)
    assert set(result["tokens_per_s"]) == {"job", "alone", "joined"}
    assert all(rate > 0 for rate in result["tokens_per_s"].values())
    assert 0 < result["busy"] <= 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["benchmark"] == "precompute"
    assert last["job_of_own"] == result["job_of_own"]


def test_joined_rows_give_the_same_kv(tmp_path):
    """What is compared does the same work: the last layer's K and V are those of `append`."""
    import torch

    from kvrag.generation.prefix_cache import PrefixCache
    from kvrag.models.forward import append
    from kvrag.models.source import open_model

    model = open_model(str(make_tiny_model(tmp_path / "m")), tmp_path, dtype=torch.float64)
    decoder = model.decoder
    prefixes = PrefixCache(decoder)
    chunks = [((3, 4, 5), (6, 7, 8, 9)), ((3, 4), (10, 11))]
    joined = precompute._join(decoder, prefixes, chunks)
    for (prefix_ids, token_ids), cache in zip(chunks, joined, strict=True):
        alone = precompute._behind(decoder, prefixes, prefix_ids, len(token_ids))
        append(decoder, token_ids, alone)
        end = len(prefix_ids) + len(token_ids)
        torch.testing.assert_close(cache.kv[:, :, :, :end], alone.kv[:, :, :, :end])
