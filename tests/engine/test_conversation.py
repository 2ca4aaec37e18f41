"""Prompts of conversations: every kind of chat template, and none at all."""

from __future__ import annotations

import pytest

from kvrag.conversation import Conversation
from kvrag.errors import InputError
from kvrag.models.tokenizer import Tokenizer
from kvrag.prompting import PASSAGES
from tests.engine.test_prompting import TEMPLATES
from tests.models.tiny_models import CHATML, SPECIAL, make_tokenizer

TALK = [
    ("system", "Be brief."),
    ("user", "Who wrote?"),
    ("assistant", "Anna."),
    ("user", "Who keeps the lamp?"),
]


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def text_of(tokenizer: Tokenizer, turns, *, with_passages: bool) -> tuple[str, str]:
    """Prefix and question as text, control tokens included."""
    conversation = Conversation.of(messages(*turns))
    layout = conversation.layout(tokenizer, "INSTRUCTION", with_passages=with_passages)
    plain = tokenizer._plain
    question = layout.question_ids(conversation.question)
    return (
        plain.decode(list(layout.prefix_ids), skip_special_tokens=False),
        plain.decode(list(question), skip_special_tokens=False),
    )


#: These leave out what models said, or refuse it.
ONE_TURN = {"qwen 2.5", "olmo 2", "parts without a system"}


@pytest.mark.parametrize("name", sorted(ONE_TURN))
def test_a_template_that_hides_a_message_is_refused(tmp_path, name):
    make_tokenizer(tmp_path, template=TEMPLATES[name][0], bos_token=SPECIAL[0])
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"does not show every message|only users"):
        text_of(tokenizer, TALK, with_passages=True)
    assert "Be brief." in text_of(tokenizer, [TALK[0], TALK[3]], with_passages=True)[0]


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - ONE_TURN))
def test_every_template_shows_all_that_was_said(tmp_path, name):
    template, _ = TEMPLATES[name]
    make_tokenizer(tmp_path, template=template, bos_token=SPECIAL[0])
    tokenizer = Tokenizer(tmp_path)
    prefix, question = text_of(tokenizer, TALK, with_passages=True)
    assert all(prefix.count(text) == 1 for _, text in TALK[:3])
    assert prefix.endswith(PASSAGES)
    assert question.startswith("Question: Who keeps the lamp?")
    prefix, question = text_of(tokenizer, TALK, with_passages=False)
    assert PASSAGES not in prefix
    assert question.startswith("Who keeps the lamp?")


@pytest.fixture
def chatml(tmp_path) -> Tokenizer:
    make_tokenizer(tmp_path, template=CHATML)
    return Tokenizer(tmp_path)


def test_the_prompt_is_the_templates(chatml):
    prefix, question = text_of(chatml, TALK, with_passages=False)
    assert prefix + question == chatml.render_chat(messages(*TALK))


def test_what_was_said_holds_no_control_tokens(chatml):
    conversation = Conversation.of(
        messages(("user", "a <|im_end|>"), ("assistant", "b <|im_start|>"), ("user", "c"))
    )
    layout = conversation.layout(chatml, "I", with_passages=False)
    start, end = (chatml.encode_template(text)[0] for text in ("<|im_start|>", "<|im_end|>"))
    assert layout.prefix_ids.count(start) == 3
    assert layout.prefix_ids.count(end) == 2


def test_the_instruction_stands_where_there_is_no_system_text(chatml):
    turns = TALK[1:]
    assert "INSTRUCTION" in text_of(chatml, turns, with_passages=True)[0]
    assert "INSTRUCTION" not in text_of(chatml, turns, with_passages=False)[0]
    assert "INSTRUCTION" not in text_of(chatml, TALK, with_passages=True)[0]


def test_neighbours_of_one_role_are_joined_and_silence_is_left_out():
    conversation = Conversation.of(
        messages(("user", "a"), ("assistant", " "), ("user", "b"), ("user", "c"))
    )
    assert conversation == Conversation((), "a\n\nb\n\nc")


def test_a_model_without_a_chat_template_sees_a_transcript(tmp_path):
    make_tokenizer(tmp_path, template=None)
    prefix, question = text_of(Tokenizer(tmp_path), TALK, with_passages=True)
    assert prefix == f"Be brief.\n\nQuestion: Who wrote?\nAnswer: Anna.\n\n{PASSAGES}"
    assert question == "Question: Who keeps the lamp?\nAnswer:"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "the user's"),
        (messages(("user", "a"), ("assistant", "b")), "the user's"),
        (messages(("tool", "a")), "roles are system, user, assistant"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "user", "content": 3}], "message 0 is int"),
        ("Who?", "must be a list"),
    ],
)
def test_what_is_no_conversation(given, match):
    with pytest.raises(InputError, match=match):
        Conversation.of(given)


def test_a_template_that_refuses_says_so(tmp_path):
    make_tokenizer(tmp_path, template="{{ raise_exception('only one turn') }}")
    conversation = Conversation.of(messages(*TALK))
    with pytest.raises(InputError, match="only one turn"):
        conversation.layout(Tokenizer(tmp_path), "I", with_passages=True)
