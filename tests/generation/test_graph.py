"""A decode step over fixed memory against the plain one, and every way to do without its graph.

What CUDA alone can do, the capture, is skipped without a GPU; a double that runs the step in its
place shows all that is around it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvrag.generation.decode import decode
from kvrag.generation.graph import FixedStep, GraphedDecoding
from kvrag.generation.kv_cache import KVCache
from kvrag.generation.params import GenerationParams
from kvrag.models.forward import extend
from kvrag.models.source import open_model
from tests.models.tiny_models import token_ids

CPU = torch.device("cpu")
PROMPT = token_ids(30)
FAMILIES = [("qwen3", "llama3"), ("gemma3", "linear"), ("phi3-window", "partial-longrope")]
MORE = token_ids(20, seed=9)


def opened(tiny, family="qwen3", rope="llama3", **options):
    folder = tiny(family, rope)
    model = open_model(str(folder), folder, **({"dtype": torch.float64} | options))
    return dataclasses.replace(model, eos_token_ids=frozenset())


def prefilled(model, ids=PROMPT):
    decoder = model.decoder
    cache = KVCache(decoder.config, 1, dtype=decoder.compute_dtype, device=decoder.device)
    return cache, extend(decoder, ids, cache)


class Capturing:
    """In place of a CUDA graph: runs the step, which must find everything where it was."""

    def __init__(self):
        self.captured = []

    def __call__(self, step):
        self.captured.append(step.cache.capacity)
        places = self.places(step)
        step.run()

        def replay():
            assert self.places(step) == places
            return step.run()

        return replay

    def places(self, step):
        tensors = (*step.cache.k, *step.cache.v, step._token_id, step._position)
        return [tensor.data_ptr() for tensor in tensors]


def said(model, graphed, *, max_tokens=12, ids=PROMPT, **params):
    params = GenerationParams(max_tokens=max_tokens, **params)
    steps = decode(model, *prefilled(model, ids), params, graphed=graphed)
    return [(step.token_id, step.text, step.finish_reason) for step in steps]


@pytest.mark.parametrize(("family", "rope"), FAMILIES)
@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_twenty_steps_equal_extend(tiny, family, rope, kernels):
    """Also beyond a window. What the cache holds behind the position, no step may see."""
    model = opened(tiny, family, rope, kernels=kernels)
    cache, _ = prefilled(model)
    with torch.inference_mode():
        step = FixedStep(model.decoder, 64)
        step.load(cache)
        for tensor in (*step.cache.k, *step.cache.v):
            # The reference multiplies what it masks by 0, and 0 × NaN is NaN.
            tensor[:, cache.length :] = torch.nan if kernels == "cpu" else 1e3
        for token_id in MORE:
            step.put(token_id)
            expected = extend(model.decoder, [token_id], cache)
            torch.testing.assert_close(step.run(), expected, atol=1e-10, rtol=0)
    for layer in range(model.decoder.config.num_layers):
        ours, theirs = step.cache.k[layer][:, :50], cache.k[layer][:, :50]
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_answers_under_a_graph(tiny):
    """The same tokens and texts, captured once for many; the request's own cache stays."""
    model, capturing = opened(tiny), Capturing()
    graphed = GraphedDecoding(model.decoder, capturing)
    for seed in (3, 4):
        options = {"temperature": 0.9, "seed": seed}
        assert said(model, graphed, **options) == said(model, None, **options)
    assert said(model, graphed, ids=token_ids(3)) == said(model, None, ids=token_ids(3))
    cache, logits = prefilled(model)
    list(decode(model, cache, logits, GenerationParams(max_tokens=5), graphed=graphed))
    assert cache.length == len(PROMPT)
    assert len(capturing.captured) == 1


def test_a_longer_sequence_is_captured_anew(tiny):
    """Up to the model's last position, where both ways end alike."""
    folder = tiny("qwen3", "default", max_position_embeddings=1500)
    model = open_model(str(folder), folder, dtype=torch.float32)
    model = dataclasses.replace(model, eos_token_ids=frozenset())
    capturing = Capturing()
    graphed = GraphedDecoding(model.decoder, capturing)
    said(model, graphed)
    for ids in (token_ids(1020), token_ids(1495), PROMPT):
        steps = said(model, graphed, ids=ids)
        assert [token for token, _, _ in steps] == [t for t, _, _ in said(model, None, ids=ids)]
        assert steps[-1][2] == "length"
    assert len(said(model, graphed, ids=token_ids(1495))) == 6
    assert capturing.captured == [1024, 1500]


def test_one_sequence_at_a_time(tiny):
    """Who comes while the graph is in use is decoded beside it; then it is free again."""
    model, capturing = opened(tiny), Capturing()
    graphed = GraphedDecoding(model.decoder, capturing)
    expected = said(model, None)
    params = GenerationParams(max_tokens=12)
    first = decode(model, *prefilled(model), params, graphed=graphed)
    begun = [next(first) for _ in range(3)]
    assert graphed._in_use.locked()
    assert said(model, graphed) == expected
    rest = [*begun, *first]
    assert [(step.token_id, step.text, step.finish_reason) for step in rest] == expected
    assert not graphed._in_use.locked()
    abandoned = decode(model, *prefilled(model), params, graphed=graphed)
    for _ in range(3):
        next(abandoned)
    abandoned.close()
    assert not graphed._in_use.locked()
    assert len(capturing.captured) == 1


def test_the_first_token_waits_for_no_capture(tiny):
    model, capturing = opened(tiny), Capturing()
    steps = decode(
        model,
        *prefilled(model),
        GenerationParams(max_tokens=3),
        graphed=GraphedDecoding(model.decoder, capturing),
    )
    next(steps)
    assert capturing.captured == []
    next(steps)
    assert capturing.captured == [model.decoder.config.max_positions]


def test_a_capture_that_fails_is_said_once(tiny, caplog):
    model = opened(tiny)
    tried = []

    def fails(step):
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed = GraphedDecoding(model.decoder, fails)
    caplog.set_level(logging.INFO)
    for _ in range(3):
        assert said(model, graphed) == said(model, None)
    assert len(tried) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not permitted when stream is capturing" in caplog.text


def test_nothing_is_captured_on_a_cpu(tiny, tmp_path):
    from tests.engine.test_answers import open_engine

    with open_engine(tiny("qwen3", "llama3"), tmp_path / "home") as engine:
        assert engine._graphed is None


def test_fixed_steps_with_tritons_kernels(tmp_path):
    """In Triton's interpreter, which needs a process of its own: see tests/kernels/test_triton."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    finished = subprocess.run(
        [sys.executable, "-m", "tests.generation.fixed_step_interpreted", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path / "triton")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_on_a_gpu(tiny):
    model = opened(tiny, dtype=torch.float32, device="cuda")
    graphed = GraphedDecoding(model.decoder)
    for ids in (PROMPT, token_ids(1200)):
        assert said(model, graphed, ids=ids) == said(model, None, ids=ids)
    assert graphed._captured is not None
