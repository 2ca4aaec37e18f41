"""The path of a CPU with bfloat16 instructions, taken here whatever the CPU is."""

from __future__ import annotations

import pytest
import torch

from kvrag import Engine, Settings
from kvrag.models import decoder as decoder_module
from tests.tiny import make_tiny_model

PASSAGES = [f"Lamp {n} of Karsk is kept by family {n}, since {1900 + n}. " * 4 for n in range(4)]
ASK = {"question": "Who keeps lamp 2?", "passages": PASSAGES, "continuation": "It is family 2."}


@pytest.fixture
def logprobs(tmp_path, monkeypatch):
    folder = make_tiny_model(tmp_path / "model")

    def measure(compute, **options):
        monkeypatch.setattr(decoder_module, "compute_dtype", lambda dtype, device: compute)
        home = tmp_path / str(compute)
        with Engine.open(Settings(model=str(folder), home=home, dtype="bfloat16")) as engine:
            assert engine.model.decoder.compute_dtype is compute
            return engine.logprobs(**ASK, **options)

    return measure


def divergence(p, q):
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.mark.parametrize("strategy", ["full", "reuse", "cacheblend"])
def test_arithmetic_in_bfloat16_is_float32_but_for_rounding(logprobs, strategy):
    native = logprobs(torch.bfloat16, strategy=strategy, ratio=0.5)
    wide = logprobs(torch.float32, strategy=strategy, ratio=0.5)
    assert native.dtype is torch.float32
    assert divergence(wide, native) < 1e-3


def test_invariants_hold_in_bfloat16_but_for_rounding(logprobs):
    full = logprobs(torch.bfloat16, strategy="full")
    assert divergence(full, logprobs(torch.bfloat16, strategy="cacheblend", ratio=1.0)) < 1e-3
    reuse = logprobs(torch.bfloat16, strategy="reuse")
    assert torch.equal(reuse, logprobs(torch.bfloat16, strategy="cacheblend", ratio=0.0))
