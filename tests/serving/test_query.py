"""Questions over HTTP: shapes, server-sent events, characters, errors on the way."""

from __future__ import annotations

import json

import httpx
import pytest

from kvrag.serving.schemas import AnswerBody
from kvrag.serving.sse import Event
from tests.serving.harness import (
    CHAIN_TEXT,
    ask,
    ask_events,
    fails_after_two,
    read_events,
    serving,
)

PASSAGES = [{"title": "Karsk", "text": "Anna keeps the lamp of Karsk."}, "The ferry is red."]


def test_json_answer_has_the_documented_shape(url, engine):
    response = ask(url, question="Who keeps the lamp?", passages=PASSAGES, max_tokens=6)
    assert response.status_code == 200
    content = response.json()
    AnswerBody.model_validate(content)  # forbids what is not documented
    assert len(content["token_ids"]) == 6
    assert content["finish_reason"] == "length"
    assert [source["title"] for source in content["sources"]] == ["Karsk", ""]
    direct = engine.answer("Who keeps the lamp?", passages=PASSAGES, max_tokens=6)
    assert content["answer"] == direct.text
    assert set(content) == set(direct.to_dict())


def test_events_come_in_order_and_agree_with_the_json_answer(url):
    whole = ask(url, question="Who?", passages=PASSAGES, max_tokens=8).json()
    events = ask_events(url, question="Who?", passages=PASSAGES, max_tokens=8)
    names = [name for name, _ in events]
    tokens = names.count("token")
    assert tokens > 1
    assert names == ["sources", *["token"] * tokens, "report", "message"]
    assert events[-1][1] == "[DONE]"
    report = events[-2][1]
    AnswerBody.model_validate(report)
    assert "".join(data["text"] for name, data in events if name == "token") == whole["answer"]
    assert (report["answer"], report["token_ids"]) == (whole["answer"], whole["token_ids"])
    assert events[0][1] == report["sources"]
    assert all(source["tier"] for source in events[0][1])


def test_pieces_never_cut_a_character(make_engine, chain_folder):
    with serving(make_engine(model=str(chain_folder))) as url:
        events = ask_events(url, question="Say it", passages=["x"], max_tokens=50)
        pieces = [data["text"] for name, data in events if name == "token"]
        assert pieces == list(CHAIN_TEXT)
        assert events[-2][1]["finish_reason"] == "stop"
        # Two bytes of the second character's three: it is not there at all.
        events = ask_events(url, question="Say it", passages=["x"], max_tokens=4)
        assert [data["text"] for name, data in events if name == "token"] == ["é"]


def test_an_answer_without_text_has_its_sources_all_the_same(make_engine, chain_folder):
    with serving(make_engine(model=str(chain_folder))) as url:
        events = ask_events(url, question="Say it", passages=["x"], stop="é")
        assert [name for name, _ in events] == ["sources", "report", "message"]
        assert events[1][1]["answer"] == ""
        assert events[0][1][0]["tier"]


@pytest.mark.parametrize("stop", ["🙂", ["zzz", "🙂"]])
def test_stop_is_a_text_or_a_list(make_engine, chain_folder, stop):
    with serving(make_engine(model=str(chain_folder))) as url:
        assert ask(url, question="Say it", passages=["x"], stop=stop).json()["answer"] == "é漢"


def test_sampling_options_reach_the_engine(url):
    options = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 7, "max_tokens": 12}
    first, again, other = (
        ask(url, question="Who?", passages=PASSAGES, **(options | {"seed": seed})).json()
        for seed in (7, 7, 8)
    )
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]


@pytest.mark.parametrize("strategy", ["full", "reuse", "cacheblend"])
def test_every_strategy_answers(url, strategy):
    response = ask(url, question="Who?", passages=PASSAGES, strategy=strategy, max_tokens=2)
    assert response.json()["report"]["strategy"] == strategy


def test_null_is_the_default(url):
    body = dict.fromkeys(["k", "strategy", "ratio", "temperature", "top_p", "seed", "stop"])
    assert ask(url, question="Who?", passages=["x"], max_tokens=1, **body).status_code == 200


def test_an_error_before_the_first_piece_is_an_ordinary_response(url):
    response = ask(url, question="Who?", stream=True)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "empty_corpus"
    assert response.json()["error"]["param"] == "passages"


def test_an_error_after_streaming_began_is_the_last_event(url, engine):
    engine.pieces = fails_after_two
    events = ask_events(url, question="Who?", passages=["x"], max_tokens=20)
    assert [name for name, _ in events] == ["sources", "token", "token", "error"]
    error = events[-1][1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "secret" not in json.dumps(events)
    engine.pieces = None
    assert ask(url, question="Who?", passages=["x"], max_tokens=1).status_code == 200


def test_a_failure_nobody_foresaw_shows_no_details(url, engine):
    engine.pieces = fails_after_two
    response = ask(url, question="Who?", passages=["x"], max_tokens=20)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_events_hold_no_line_end_that_a_reader_could_take_for_one():
    text = "a\u2028b\u2029c\x85d\x1ce\nf\rg"
    encoded = Event("token", {"text": text}).encode().decode()
    assert list(read_events(iter(encoded.splitlines()))) == [("token", {"text": text})]


def test_question_over_the_corpus(url):
    documents = [{"text": f"Lamp number {i} is kept by keeper {i}."} for i in range(5)]
    assert httpx.post(f"{url}/v1/documents", json={"documents": documents}).status_code == 200
    content = ask(url, question="Which lamp?", k=3, max_tokens=2).json()
    assert len(content["sources"]) == 3
    assert all(source["tier"] in ("ram", "disk") for source in content["sources"])
    assert all(source["document"] for source in content["sources"])
