"""Homes with small corpora of tiny models, and the commands as functions."""

from __future__ import annotations

import pytest

from kvrag import Engine, Settings
from kvrag.corpora.exporting import export_corpus
from kvrag.corpora.importing import import_corpus
from kvrag.retrieval import Document
from tests.tiny import make_tiny_embedder, make_tiny_model

#: The first two have a chunk in common; the last was named by its user.
DOCUMENTS = (
    Document("Anna keeps the lamp of Karsk.", title="Karsk", source="a", origin="file:///a"),
    Document("Bela built the cableway. " * 12, title="Cableway", metadata={"year": [1921, None]}),
    Document("The ferry\n\nleaves at \N{SNOWMAN} nine.", id="ferry/1", source="b"),
)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora-models")
    return {
        "model": str(make_tiny_model(root / "model")),
        "embedder": str(make_tiny_embedder(root / "embedder")),
    }


@pytest.fixture
def settings(models, tmp_path):
    """`settings(home, …)` of the tiny models."""

    def make(home="home", **options):
        values = {"home": tmp_path / home, "dtype": "float32", "threads": 1, "chunk_tokens": 64}
        return Settings(**(models | values | options))

    return make


@pytest.fixture
def made(settings):
    """`made(home, …)`: the settings of a home whose corpus has the documents above."""

    def make(home="home", documents=DOCUMENTS, **options):
        chosen = settings(home, **options)
        with Engine.open(chosen) as engine:
            engine.add(documents)
        return chosen

    return make


def nobody(holder):
    raise AssertionError(f"waits for {holder}")


def exported(settings, path):
    return export_corpus(settings, path, waiting=nobody, report=lambda standing: None)


def imported(settings, path, name=None):
    return import_corpus(settings, path, name, waiting=nobody, report=lambda standing: None)
