"""`kvrag ask` over passages and over a corpus of a tiny model."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from kvrag.config import Settings
from kvrag.engine import Engine
from kvrag.searching import Search
from tests.cli.conftest import execute

PASSAGES = [
    {"title": "The lamp", "text": "Anna keeps the lamp of Karsk."},
    {"text": "The ferry leaves at six."},
]


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps(passage) + "\n" for passage in PASSAGES))
    return path


def test_json_is_the_answer_and_nothing_else(kvrag, passages):
    result = kvrag(
        "ask", "Who?", "--passages", passages, "--max-tokens", 6, "--json", "--trace",
        "--show-sources",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    with Engine.open(Settings()) as engine:
        answer = engine.answer("Who?", passages=PASSAGES, max_tokens=6)
    expected, got = answer.to_dict(), result.json
    assert got.keys() == expected.keys()
    assert got["answer"] == answer.text
    assert got["token_ids"] == list(answer.token_ids)
    assert got["report"].keys() == expected["report"].keys()
    assert [source["tier"] for source in got["sources"]] == ["computed", "computed"]


def test_the_answer_is_streamed_as_text(kvrag, passages):
    text = kvrag("ask", "Who?", "--passages", passages, "--max-tokens", 8)
    as_json = kvrag("ask", "Who?", "--passages", passages, "--max-tokens", 8, "--json")
    assert (text.code, text.err) == (0, "")
    assert text.out == as_json.json["answer"] + "\n"


def test_every_generation_option_reaches_the_engine(kvrag, passages, monkeypatch):
    seen = {}

    def stream(self, question, **options):
        seen.update(options, question=question)
        raise KeyboardInterrupt

    monkeypatch.setattr("kvrag.engine.Engine.stream", stream)
    result = kvrag(
        "ask", "Who?", "--k", 3, "--strategy", "reuse", "--ratio", 0.5, "--max-tokens", 7,
        "--temperature", 0.7, "--top-p", 0.9, "--top-k", 5, "--seed", 11, "--stop", "a",
        "--stop", "b", "--per-token", "--search", "dense", "--where", '{"a": 1}',
        "--mmr", 0.5, "--distinct", 0.8, "--rerank", "cross_encoder",
    )  # fmt: skip
    assert result.code == 130
    assert seen == {
        "question": "Who?",
        "passages": None,
        "k": 3,
        "strategy": "reuse",
        "ratio": 0.5,
        "search": Search("dense", {"a": 1}, 0.5, 0.8, "cross_encoder"),
        "per_token": True,
        "max_tokens": 7,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 11,
        "stop": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--search", "words"), "allowed are hybrid, dense, lexical"),
        (("--where", "{"), "--where is no JSON"),
        (("--where", "[1]"), "a JSON object is needed"),
        (("--where", '{"a": {"like": 1}}'), "allowed are eq, in"),
        (("--mmr", 2), "mmr is 2.0; it must be a number from 0 to 1"),
        (("--distinct", -1), "distinct is -1.0; it must be a number from 0 to 1"),
        (("--rerank", "bert"), "allowed are none, cross_encoder"),
    ],
)
def test_a_search_is_refused_before_the_model_is_opened(kvrag, options, reason, monkeypatch):
    monkeypatch.setattr("kvrag.engine.Engine.open", lambda settings: 1 / 0)
    result = kvrag("ask", "Who?", *options)
    assert result.code not in (0, None)
    assert reason in result.err


def test_tables(kvrag, passages):
    result = kvrag(
        "ask", "Who?", "--passages", passages, "--max-tokens", 3, "--show-sources", "--trace"
    )
    assert result.code == 0
    for text in ("Sources", "passage-0", "The lamp", "Anna keeps the lamp", "computed"):
        assert text in result.out
    for text in ("time to first token", "retrieve", "stall", "decode", "effective ratio"):
        assert text in result.out
    for text in ("prefix_match", "yes", "recomputed", "new tokens"):
        assert text in result.out


def test_titles_are_no_markup_and_steer_no_terminal(kvrag, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"title": "[red]x[/] \x1b[31m", "text": "y"}))
    result = kvrag("ask", "Who?", "--passages", path, "--max-tokens", 1, "--show-sources")
    assert "[red]x[/] \ufffd[31m" in result.out


def test_a_question_from_stdin(kvrag, passages, monkeypatch):
    def given(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return kvrag("ask", "-", "--passages", passages, "--max-tokens", 3, "--json")

    expected = kvrag("ask", "Wér?", "--passages", passages, "--max-tokens", 3, "--json")
    assert given("Wér?\n".encode()).json["token_ids"] == expected.json["token_ids"]
    assert "the question is not valid UTF-8" in given(b"\xff\xfe").error
    result = given(b"")
    assert result.code == 2
    assert "the question is empty" in result.error


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (b'{"text": "a"}\n\nnope\n', ":3 is no passage"),
        (b'{"text": "a"}\n["b"]\n', ":2 is no passage"),
        (b'{"title": "a"}\n', ":1 is no passage: it has no text"),
        (b'{"text": "  "}\n', ":1 is no passage: it has no text"),
        (b'{"text": 7}\n', ":1 is no passage: 'text' is no text"),
        (b'{"text": "a", "url": "b"}\n', ":1 is no passage: unknown fields 'url'"),
        (b'{"text": "\\ud800"}\n', ":1 is no passage"),
        (b"\x00\xff\x00", ":1 is no passage"),
        (b"[" * 100_000, ":1 is no passage"),
        (b"\n\n", "holds no passages"),
    ],
)
def test_a_malformed_line_is_named(kvrag, tmp_path, lines, says):
    path = tmp_path / "passages.jsonl"
    path.write_bytes(lines)
    result = kvrag("ask", "x", "--passages", path)
    assert result.code == 2
    assert f"{path.name}{says}" in result.error or says in result.error


def test_a_passages_file_that_cannot_be_read(kvrag, tmp_path):
    assert "cannot be read: No such file" in kvrag("ask", "x", "--passages", tmp_path / "no").error
    assert "cannot be read: Is a directory" in kvrag("ask", "x", "--passages", tmp_path).error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--strategy", "nope"], "unknown fusion strategy 'nope'"),
        (["--ratio", "1.5"], "ratio is 1.5"),
        (["--k", "0"], "k is 0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--stop", ""], "stop is"),
        ([], "the corpus is empty"),
    ],
)
def test_what_the_engine_refuses_is_its_sentence_and_2(kvrag, options, says):
    result = kvrag("ask", "Who?", *options)
    assert (result.code, result.out) == (2, "")
    assert says in result.error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--strategy", "nope"], "unknown fusion strategy 'nope'"),
        (["--strategy", "epic:"], "no option ''; it has ratio"),
        (["--strategy", "epic:tokens=2,tokens=4"], "given twice"),
        (["--strategy", "fast:ratio=2"], "ratio is 2.0"),
        (["--ratio", "1.5"], "ratio is 1.5"),
        (["--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_a_bad_option_is_found_before_the_model_is_opened(kvrag, options, says):
    result = kvrag("--model", "/nowhere", "ask", "Who?", *options)
    assert (result.code, result.out) == (2, "")
    assert says in result.error


def test_passages_and_k_exclude_each_other(kvrag, passages):
    result = kvrag("ask", "x", "--passages", passages, "--k", 2)
    assert result.code == 2
    assert "give passages or k, not both" in result.error


def test_models_that_cannot_be_opened(kvrag, tmp_path, tiny_folders):
    empty = tmp_path / "empty"
    empty.mkdir()
    weightless = shutil.copytree(tiny_folders[0], tmp_path / "weightless")
    (weightless / "model.safetensors").unlink()
    for model, code, says in (
        ("no-such-model", 2, "no model 'no-such-model'"),
        (empty, 2, "config.json is missing"),
        (weightless, 2, "holds no weights"),
    ):
        result = kvrag("--model", model, "ask", "x")
        assert result.code == code
        assert says in result.error
    (weightless / "model.safetensors").write_bytes(b"damaged")
    result = kvrag("--model", weightless, "ask", "x")
    assert result.code == 1
    assert "is damaged" in result.error


def test_the_real_command(environment, passages):
    result = execute("ask", "Who?", "--passages", passages, "--max-tokens", 3, "--json")
    assert (result.code, result.err) == (0, "")
    assert set(result.json) == {"answer", "token_ids", "finish_reason", "sources", "report"}
