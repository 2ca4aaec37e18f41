from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvrag.config import Settings
from tests.serving.harness import HashEmbedder, WatchedEngine, make_model, serving


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def chain_folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("chain"), chain=True)


@pytest.fixture(autouse=True)
def hash_embedder(monkeypatch, request) -> None:
    if request.node.get_closest_marker("models") is None:
        monkeypatch.setattr("kvrag.corpus.open_embedder", lambda name: HashEmbedder())


@pytest.fixture
def make_engine(tmp_path, model_folder) -> Iterator[Callable[..., WatchedEngine]]:
    """`make_engine(**settings)` is an engine on the tiny model in a home of its own."""
    engines: list[WatchedEngine] = []

    def make(**settings) -> WatchedEngine:
        defaults = {
            "model": str(model_folder),
            "home": tmp_path / f"home-{len(engines)}",
            "threads": 1,
            "ram_bytes": 2**24,
        }
        engines.append(WatchedEngine.open(Settings(**(defaults | settings))))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine) -> WatchedEngine:
    return make_engine()


@pytest.fixture
def url(engine) -> Iterator[str]:
    """A server over `engine`."""
    with serving(engine) as url:
        yield url
