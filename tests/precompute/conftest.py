"""Tiny models that the tests of the job share; none of them changes one."""

from __future__ import annotations

import pytest

from tests.tiny import make_tiny_embedder, make_tiny_model


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("precompute-models")
    return {
        "model": str(make_tiny_model(root / "model")),
        "embedder": str(make_tiny_embedder(root / "embedder")),
    }
