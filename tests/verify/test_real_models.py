"""The checks on the packaged models: sound ones pass, and what fidelity can and cannot see."""

from __future__ import annotations

import pytest
import torch

from kvrag.config import Settings
from kvrag.models.source import open_model
from kvrag.verify.bounds import BLEND_KL
from kvrag.verify.gate import verify
from tests.verify.broken import ROPE_BREAKS, break_rope

# Seconds on an idle machine; minutes on a busy one.
pytestmark = [pytest.mark.models, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def opened(models_dir):
    """`opened(name)` is settings and an open model."""
    found = {}

    def get(name):
        if name not in found:
            settings = Settings(model=name, models_dir=models_dir, threads=1)
            dtype = getattr(torch, settings.dtype)
            found[name] = settings, open_model(name, models_dir, dtype=dtype)
        return found[name]

    return get


def failed(verdict) -> set[tuple[str, str]]:
    return {(check.name, check.subject) for check in verdict.checks if not check.passed}


def test_smollm2_passes(opened):
    settings, model = opened("smollm2-135m")
    verdict = verify(settings, model=model, short=True)
    assert failed(verdict) == set()
    fidelity = {c.subject: c for c in verdict.checks if c.name == "fidelity"}
    assert {"reuse", settings.strategy} <= set(fidelity)
    # Or nothing was blended.
    assert all(1e-4 < check.value < BLEND_KL for check in fidelity.values())


def test_gemma3_passes(opened):
    """Two kinds of RoPE, and windows."""
    settings, model = opened("gemma3-270m")
    verdict = verify(settings, model=model, short=True)
    assert failed(verdict) == set()
    assert {"layers 0-4, 6-10, 12-16", "layers 5, 11, 17"} <= {c.subject for c in verdict.checks}


@pytest.mark.parametrize("how", ["one place late", "rotated twice"])
def test_wrong_places_are_found(opened, monkeypatch, how):
    """By K itself, always; by the answers only where K is turned to places that do not exist.

    This model hardly minds where a chunk stands as long as it stands in one piece (docs/cli.md).
    """
    settings, model = opened("smollm2-135m")
    break_rope(monkeypatch, ROPE_BREAKS[how])
    found = failed(verify(settings, model=model, short=True))
    assert {("position", "layers 0-29"), ("position", "reuse")} <= found
    assert (("fidelity", "reuse") in found) == (how == "rotated twice")
