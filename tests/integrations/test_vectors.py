"""A vector store in the vector index's place: Qdrant, in this process, over a folder."""

from __future__ import annotations

import pytest

pytest.importorskip("langchain_core", reason="needs the extra kvrag[langchain]")
pytest.importorskip("langchain_qdrant", reason="needs langchain-qdrant")

from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_qdrant import QdrantVectorStore
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, VectorParams

from kvrag import Engine, Settings
from kvrag.errors import InputError
from kvrag.integrations.langchain import KVRagEmbeddings, LangChainEmbedder
from kvrag.integrations.langchain.vectors import StoredVectors
from kvrag.retrieval import Document, open_embedder
from kvrag.retrieval.errors import VectorStoreError
from kvrag.searching import Search
from tests.tiny import make_tiny_embedder, make_tiny_model

DOCUMENTS = [
    Document("Anna keeps the lamp of Karsk.", title="Karsk", metadata={"year": 1921}),
    Document("The cableway of Orrel is painted green.", title="Orrel", metadata={"year": 1950}),
    Document("Vessin has a lead mine, closed since the flood.", title="Vessin"),
]
QUESTION = "Who keeps the lamp?"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "model": str(make_tiny_model(root / "model")),
        "embedder": str(make_tiny_embedder(root / "embedder")),
        "dtype": "float32",
        "threads": 1,
        "corpus_context": "",
        "k": 2,
    }


@pytest.fixture(scope="module")
def embedder(models):
    return open_embedder(models["embedder"])


@pytest.fixture
def client(tmp_path):
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    yield client
    client.close()


@pytest.fixture
def settings(models, tmp_path):
    return Settings(**models, home=tmp_path / "home")


def collection(client, embeddings, width, name="corpus"):
    if not client.collection_exists(name):
        client.create_collection(name, VectorParams(size=width, distance=Distance.COSINE))
    return QdrantVectorStore(client, name, embedding=embeddings)


@pytest.fixture
def store(client, embedder):
    return collection(client, KVRagEmbeddings(embedder), embedder.dim)


def index_of(engine) -> StoredVectors:
    _, index = engine._open_corpus()[0]._open()
    assert isinstance(index, StoredVectors)
    return index


def found(engine, **options):
    return [(item.chunk.document, item.score) for item in engine.retrieve(QUESTION, **options)]


def test_it_finds_what_the_vector_index_finds(settings, store, client, embedder, monkeypatch):
    made = []
    embed = type(embedder).embed_documents
    monkeypatch.setattr(
        type(embedder), "embed_documents", lambda self, texts: made.append(len(texts)) or embed(
            self, texts
        )
    )  # fmt: skip
    with Engine.open(settings, vectors=store) as engine:
        engine.add(DOCUMENTS)
        assert client.count("corpus").count == 3
        assert sum(made) == 3  # the store was given the catalog's vectors
        assert engine.answer(QUESTION, search="dense", max_tokens=1).sources
        searches = [
            Search(mode=mode, where=where)
            for mode in ("dense", "hybrid")
            for where in (None, {"year": {"lt": 1940}})
        ]
        answers = [found(engine, k=3, search=search) for search in searches]
        index = index_of(engine)
        assert (len(index), index.is_saved, index.num_dropped) == (3, True, 0)
    assert not list(settings.home.rglob("*.faiss"))
    with Engine.open(settings) as engine:
        for search, expected in zip(searches, answers, strict=True):
            again = found(engine, k=3, search=search)
            assert [document for document, _ in again] == [document for document, _ in expected]
            scores = [score for _, score in expected]
            assert [score for _, score in again] == pytest.approx(scores, abs=1e-12)


def test_what_changes_is_written_to_it_by_whoever_comes_first(settings, store, client):
    with Engine.open(settings) as engine:  # without the store
        engine.add(DOCUMENTS[:2])
    with Engine.open(settings, vectors=store) as engine:
        assert len(found(engine, k=3, search="dense")) == 2
        assert client.count("corpus").count == 2
        engine.delete(DOCUMENTS[0].id)
        assert [document for document, _ in found(engine, k=3, search="dense")] == [DOCUMENTS[1].id]
        assert client.count("corpus").count == 1
        assert index_of(engine).num_dropped == 0
    with Engine.open(settings) as engine:
        engine.add(DOCUMENTS)
        engine.delete(DOCUMENTS[1].id)
    writes = []
    inner = store.add_texts
    with Engine.open(settings, vectors=store) as engine:
        store.add_texts = lambda texts, *rest, **more: (
            writes.append(len(texts)) or inner(texts, *rest, **more)
        )
        found(engine, search="dense")
        assert client.count("corpus").count == 2
        assert sum(writes) == 2
    with Engine.open(settings, vectors=store) as engine:
        found(engine, search="dense")
    assert sum(writes) == 2  # nothing is written again


def test_chunks_that_the_catalog_lacks_are_dropped_and_counted(settings, store, client):
    with Engine.open(settings, vectors=store) as engine:
        engine.add(DOCUMENTS)
        index = index_of(engine)
        # Another's text, one that names a chunk that never was, and one that says nonsense.
        of_corpus = {"kvrag_corpus": index._corpus}
        store.add_texts(
            [QUESTION, QUESTION, QUESTION],
            [{}, {"kvrag_chunk": 10**6, **of_corpus}, {"kvrag_chunk": "x", **of_corpus}],
        )
        assert len(found(engine, k=3, search="dense")) == 3
        assert index.num_dropped == 3
        assert len(found(engine, k=3, search="hybrid")) == 3


def test_another_collection_is_filled_anew(settings, store, client, embedder):
    with Engine.open(settings, vectors=store) as engine:
        engine.add(DOCUMENTS)
    client.delete_collection("corpus")
    empty = collection(client, KVRagEmbeddings(embedder), embedder.dim)
    with Engine.open(settings, vectors=empty) as engine:
        assert len(found(engine, k=3, search="dense")) == 3
    assert client.count("corpus").count == 3


def test_filters_wider_than_are_compared_one_by_one(settings, store, monkeypatch):
    monkeypatch.setattr("kvrag.integrations.langchain.vectors._EXACT_CHUNKS", 0)
    monkeypatch.setattr("kvrag.integrations.langchain.vectors._SLACK", 0)
    with Engine.open(settings, vectors=store) as engine:
        engine.add(DOCUMENTS)
        search = Search(mode="dense", where={"year": {"gte": 1940}})
        assert [document for document, _ in found(engine, k=1, search=search)] == [DOCUMENTS[1].id]


def test_a_store_with_its_own_embeddings(settings, client):
    own = DeterministicFakeEmbedding(size=12)
    with Engine.open(settings, vectors=collection(client, own, 12)) as engine:
        assert isinstance(engine.embedder, LangChainEmbedder)
        engine.add(DOCUMENTS)
        (first, score), *_ = found(engine, k=3, search="dense")
        assert index_of(engine).num_dropped == 0
        assert -1 <= score <= 1
    with Engine.open(settings, embedder=LangChainEmbedder(own)) as engine:
        assert found(engine, k=3, search="dense")[0][0] == first


def test_a_store_that_is_out_says_so(settings, store, client):
    with Engine.open(settings, vectors=store) as engine:
        engine.add(DOCUMENTS)
        client.delete_collection("corpus")
        with pytest.raises(VectorStoreError, match="QdrantVectorStore"):
            engine.retrieve(QUESTION, search="dense")
        assert len(found(engine, k=1, search="lexical")) == 1


def test_what_is_refused(settings, store, embedder):
    with pytest.raises(InputError, match="not both"):
        Engine.open(settings, vectors=store, embedder=embedder)

    class Without(InMemoryVectorStore):
        embeddings = None

    with pytest.raises(InputError, match="names no embeddings"):
        Engine.open(settings, vectors=Without(KVRagEmbeddings(embedder)))
