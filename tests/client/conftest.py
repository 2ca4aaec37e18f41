from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvrag.client import KVRagClient
from kvrag.config import Settings
from tests.serving.harness import HashEmbedder, WatchedEngine, make_model, serving


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[WatchedEngine]:
    folder = tmp_path_factory.mktemp("client")
    settings = Settings(
        model=str(make_model(folder / "model")),
        home=folder / "home",
        threads=1,
        ram_bytes=2**24,
        disk_fsync="never",
    )
    with WatchedEngine.open(settings, embedder=HashEmbedder()) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with serving(engine) as url:
        yield url


@pytest.fixture
def client(url) -> Iterator[KVRagClient]:
    with KVRagClient(url, retries=0) as client:
        for document in client.documents().documents:
            client.delete(document.id)
        yield client
