"""Search modes, filters and MMR through the engine: tiny models, real SQLite and FAISS."""

from __future__ import annotations

import pytest

from kvrag import Engine, Settings
from kvrag.errors import (
    EmptyCorpusError,
    InputError,
    ModelNotFoundError,
    NothingFoundError,
    SettingsError,
)
from kvrag.retrieval import CrossEncoderReranker, Document, render_chunk
from kvrag.searching import Search
from tests.tiny import make_tiny_cross_encoder, make_tiny_embedder, make_tiny_model

DOCUMENTS = [
    Document("Anna keeps the lamp of Karsk.", title="Karsk", metadata={"year": 1921}),
    Document("The cableway of Orrel is painted green.", title="Orrel", metadata={"year": 1950}),
    Document("Vessin has a lead mine, closed since the flood.", title="Vessin"),
]
QUESTION = "Who keeps the lamp?"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return Settings(
        model=str(make_tiny_model(root / "model")),
        embedder=str(make_tiny_embedder(root / "embedder")),
        home=root / "home",
        dtype="float32",
        threads=1,
        corpus_context="",
        k=2,
    )


@pytest.fixture(scope="module")
def engine(settings):
    with Engine.open(settings) as opened:
        with pytest.raises(EmptyCorpusError):
            opened.retrieve(QUESTION)
        opened.add(DOCUMENTS)
        yield opened


def titles(found):
    return [item.chunk.title for item in found]


def test_the_mode_of_a_request_and_of_the_settings(engine, settings):
    by_words = engine.retrieve(QUESTION, search="lexical")
    assert titles(by_words)[0] == "Karsk"
    assert by_words[0].score == by_words[0].chunk.match.bm25
    by_meaning = engine.retrieve(QUESTION, k=3, search=Search("dense"))
    assert [item.chunk.match.dense_rank for item in by_meaning] == [1, 2, 3]
    assert by_meaning[0].score == by_meaning[0].chunk.match.cosine
    both = engine.retrieve(QUESTION)
    assert 1 >= both[0].score >= both[1].score > 0
    values = settings.model_dump() | {"search": "lexical", "home": settings.home}
    with Engine(Settings(**values), model=engine.model) as other:
        assert titles(other.retrieve("lamp")) == ["Karsk"]


def test_a_filter_is_kept_to_and_k_chunks_come_back(engine):
    where = {"year": {"gte": 1950}}
    for mode in ("hybrid", "dense"):
        assert titles(engine.retrieve(QUESTION, k=1, search=Search(mode, where))) == ["Orrel"]
    answer = engine.answer(QUESTION, search=Search(where=where, mmr=0.5), max_tokens=1)
    (source,) = answer.sources
    assert source.title == "Orrel"
    assert answer.to_dict()["sources"][0]["match"]["dense_rank"] == 1


def test_nothing_found_is_no_empty_corpus(engine):
    nowhere = Search(where={"year": 1})
    assert engine.retrieve(QUESTION, search=nowhere) == []
    assert engine.retrieve("xyzzy", search="lexical") == []
    with pytest.raises(NothingFoundError, match="none passes the filter"):
        engine.answer(QUESTION, search=nowhere, max_tokens=1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Search("bm25"), "'bm25'; allowed are hybrid, dense, lexical"),
        (lambda: Search(where={}), "one field or more"),
        (lambda: Search(where={"a": {"like": 1}}), "allowed are eq, in"),
        (lambda: Search(rerank="bert"), "'bert'; allowed are none, cross_encoder"),
        (lambda: Search(mmr=1.5), "from 0 to 1"),
        (lambda: Search(mmr=True), "from 0 to 1"),
        (lambda: Search(mmr=float("nan")), "from 0 to 1"),
    ],
)
def test_a_search_is_checked_when_it_is_made(make, reason):
    with pytest.raises(InputError, match=reason):
        make()


def test_what_does_not_go_together(engine):
    with pytest.raises(InputError, match="passages or search"):
        engine.answer(QUESTION, passages=["x"], search="dense", max_tokens=1)
    with pytest.raises(InputError, match="'words'; allowed are"):
        engine.retrieve(QUESTION, search="words")
    with pytest.raises(SettingsError, match="'search'"):
        Settings(search="words")
    with pytest.raises(SettingsError, match="needs the setting cross_encoder"):
        Settings(rerank="cross_encoder")


def test_continuations_are_scored_over_what_a_search_finds(engine):
    one = engine.logprobs(QUESTION, continuation="Anna", search=Search(where={"year": 1921}))
    other = engine.logprobs(QUESTION, continuation="Anna", search=Search(where={"year": 1950}))
    assert (one - other).abs().max() > 1e-4


def test_the_settings_cross_encoder_orders_what_was_found(engine, settings, tmp_path):
    folder = make_tiny_cross_encoder(tmp_path / "cross_encoder")
    texts = [render_chunk(document.title, document.text) for document in DOCUMENTS]
    scores = CrossEncoderReranker(folder).scores(QUESTION, texts)
    best = DOCUMENTS[int(scores.argmax())].title
    values = settings.model_dump() | {"home": settings.home, "cross_encoder": str(folder)}
    with Engine(Settings(**values), model=engine.model) as other:
        (first,) = other.retrieve(QUESTION, k=1, search=Search(rerank="cross_encoder"))
        assert first.chunk.title == best
        assert first.score == pytest.approx(float(scores.max()), abs=1e-5)
        assert titles(other.retrieve(QUESTION)) == titles(engine.retrieve(QUESTION))
        reranked = Search(rerank="cross_encoder")
        answer = other.answer(QUESTION, k=1, search=reranked, max_tokens=1)
        assert answer.sources[0].title == best
    with Engine(Settings(**values | {"rerank": "cross_encoder"}), model=engine.model) as other:
        assert titles(other.retrieve(QUESTION, k=1)) == [best]
        unranked = other.retrieve(QUESTION, search=Search(rerank="none"))
        assert titles(unranked) == titles(engine.retrieve(QUESTION))


def test_reranking_without_a_cross_encoder_is_refused(engine, settings, tmp_path):
    with pytest.raises(InputError, match="the setting cross_encoder names none"):
        engine.retrieve(QUESTION, search=Search(rerank="cross_encoder"))
    values = settings.model_dump() | {"home": settings.home, "cross_encoder": str(tmp_path / "no")}
    with (
        Engine(Settings(**values), model=engine.model) as other,
        pytest.raises(ModelNotFoundError, match="neither a folder nor a hub"),
    ):
        other.retrieve(QUESTION, search=Search(rerank="cross_encoder"))
