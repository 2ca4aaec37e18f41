from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrag.config import Settings
from kvrag.engine import Engine
from kvrag.retrieval import Document
from tests.serving.harness import HashEmbedder, WatchedEngine, make_model, serving

TEXTS = ("Anna keeps the lamp.", "The ferry is red.", "The mine is closed.", "Boris bakes bread.")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A model that says the same short text to everything."""
    return make_model(tmp_path_factory.mktemp("model"), chain=True)


@pytest.fixture(scope="session")
def make_settings(tmp_path_factory, model_folder):
    """`make_settings(**settings)` is for a home of its own."""

    def make(**settings) -> Settings:
        defaults = {
            "model": str(model_folder),
            "home": tmp_path_factory.mktemp("home"),
            "threads": 1,
            "ram_bytes": 2**24,
            "disk_fsync": "never",
            "k": 2,
        }
        return Settings(**(defaults | settings))

    return make


@pytest.fixture(scope="module")
def engine(make_settings) -> Iterator[Engine]:
    """Over a corpus of four documents."""
    with WatchedEngine.open(make_settings(), embedder=HashEmbedder()) as engine:
        engine.add(
            [Document(text, title=f"T{i}", metadata={"n": i}) for i, text in enumerate(TEXTS)]
        )
        yield engine


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="class", params=["engine", "url"])
def source(request):
    """What adapters are given: an engine of this process, and a server's address."""
    return request.getfixturevalue(request.param)
