"""Every parameter with what it does not take: a typed error with a sentence that names it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kvrag.errors import InputError, KvragError, ModelNotFoundError, SettingsError
from kvrag.store.errors import StoreError
from tests.engine.test_answers import PASSAGES, QUESTION, ask, open_engine


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    with open_engine(tiny("llama"), tmp_path_factory.mktemp("engine") / "home") as engine:
        yield engine


def check(call, word):
    """InputError, one sentence in plain words with the parameter's name."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert re.search(word, message), message
    assert "\n" not in message


@pytest.mark.parametrize("question", ["", "  \n\t", None, 5, b"bytes", ["a"]])
def test_question(engine, question):
    check(lambda: ask(engine, question), "question")


@pytest.mark.parametrize("text", ["\ud800", "lamp \udfff?", "a\udc80b"])
@pytest.mark.parametrize("where", ["question", "passage", "title", "continuation", "stop"])
def test_lone_surrogates(engine, text, where):
    r"""JSON may hold "\ud800", which is no character: the tokenizer raised TypeError on it."""
    if where == "question":
        check(lambda: ask(engine, text), "question")
    elif where == "passage":
        check(lambda: ask(engine, passages=[text]), "passage 0")
    elif where == "title":
        check(lambda: ask(engine, passages=[{"title": text, "text": "x"}]), "passage 0")
    elif where == "continuation":
        check(
            lambda: engine.logprobs(QUESTION, passages=PASSAGES, continuation=text),
            "continuation",
        )
    else:  # it can never occur, which is no error
        assert ask(engine, stop=[text]).finish_reason == "length"


@pytest.mark.parametrize(
    ("passages", "word"),
    [
        ([], "passages is empty"),
        ("text", "list"),
        ({"text": "x"}, "list"),
        (5, "list"),
        ((x for x in ["a"]), "list"),
        ([5], "passage 0"),
        (["a", None], "passage 1"),
        ([["a"]], "passage 0"),
        ([""], "passage 0"),
        ([{"text": "  "}], "passage 0"),
        ([{}], "passage 0"),
        ([{"text": 5}], "passage 0"),
        ([{"text": "x", "title": 5}], "passage 0"),
        ([{"text": "x", "titel": "y"}], "titel"),
        ([{5: "x"}], "passage 0"),
        ([b"bytes"], "passage 0"),
        (b"bytes", "passage"),
    ],
)
def test_passages(engine, passages, word):
    check(lambda: ask(engine, passages=passages), word)


def test_passages_and_k(engine):
    check(lambda: ask(engine, k=3), "not both")


@pytest.mark.parametrize("k", [0, -1, True, 1.5, "3"])
def test_k(engine, k):
    check(lambda: engine.answer(QUESTION, k=k), "k is")


@pytest.mark.parametrize("strategy", ["magic", "", "FULL", 5, ["full"], {"name": "full"}])
def test_strategy(engine, strategy):
    """An empty name ran the default strategy, a list raised TypeError."""
    check(lambda: ask(engine, strategy=strategy), "strategy.*cacheblend")


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), "0.5", [0.5]])
@pytest.mark.parametrize("strategy", ["cacheblend", "full"])
def test_ratio(engine, ratio, strategy):
    check(lambda: ask(engine, ratio=ratio, strategy=strategy), "ratio")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", "5"),
        ("max_tokens", None),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", "0.5"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", "7"),
        ("stop", 5),
        ("stop", [5]),
        ("stop", [""]),
        ("stop", ""),
    ],
)
def test_generation_options(engine, name, value):
    """A value of a wrong type was called an "unknown option", or failed in the decoding loop."""
    check(lambda: ask(engine, **{name: value}), f"^{name} is {re.escape(repr(value))}|^{name} is")


def test_unknown_option_names_the_known(engine):
    with pytest.raises(InputError) as caught:
        ask(engine, temprature=0.5)
    assert "temprature" in str(caught.value)
    assert "temperature" in str(caught.value)


@pytest.mark.parametrize(
    "continuation", ["", [], None, 5, [400], [-1], [1.5], ["a"], [None], [[1]]]
)
def test_continuation(engine, continuation):
    """None raised TypeError, a text that is no number ValueError, and 1.5 was cut to 1."""
    check(
        lambda: engine.logprobs(QUESTION, passages=PASSAGES, continuation=continuation),
        "continuation",
    )


def test_wrong_input_leaves_nothing_behind(engine):
    assert engine.stats().open_blocks == 0
    assert ask(engine).finish_reason == "length"


# ---- opening -------------------------------------------------------------------------------------


def test_no_such_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        open_engine("no-such-model", tmp_path / "home")


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("device", "gpu!", SettingsError),
        ("device", "cuda:99", (SettingsError, KvragError)),
        ("codec", "zip", (SettingsError, StoreError)),
        ("strategy", "magic", KvragError),
        ("strategy", "", KvragError),
        ("dtype", "float16", SettingsError),
        ("threads", 0, SettingsError),
        ("ratio", 1.5, SettingsError),
        ("namespace", "", SettingsError),
        ("instruction", "", SettingsError),
        ("instruction", "\ud800", KvragError),
        ("namespace", "\ud800", (KvragError, StoreError)),
    ],
)
def test_wrong_settings_are_found_at_the_opening(tiny, tmp_path, name, value, error):
    """Not at the first question: a server would start and fail on every request."""
    with pytest.raises(error, match=r".{10}"):
        open_engine(tiny("llama"), tmp_path / "home", **{name: value}).close()


def test_home_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="file"):
        open_engine(tiny("llama"), tmp_path / "file" / "home")


def test_home_with_a_damaged_secret(tiny, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "key.secret").write_bytes(b"short")
    with pytest.raises(StoreError, match="secret"):
        open_engine(tiny("llama"), home)
    assert (home / "key.secret").read_bytes() == b"short"


def test_a_prompt_of_ids_is_checked(engine):
    """`fill` takes ids as they are, but not ids that are no tokens, nor a false promise."""
    prompt = engine.prompt(QUESTION, ["Anna keeps the lamp. " * 4, "The ferry is red. " * 4])
    vocab = engine.model.decoder.config.vocab_size
    for token_id in (-1, vocab):
        wrong = replace(prompt, question_ids=(*prompt.question_ids, token_id))
        check(lambda wrong=wrong: engine.fill(wrong, new_tokens=1), "ids that are no tokens")
    room = engine.model.decoder.config.max_positions
    check(lambda: engine.fill(prompt, new_tokens=room), "context holds")
    foreign = replace(prompt, prefix_ids=prompt.prefix_ids[::-1], prefix_match=True)
    filled = engine.fill(foreign, new_tokens=1, strategy="reuse")
    assert not filled.prompt.prefix_match
