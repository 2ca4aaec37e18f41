"""The layout of a prompt whose question is the last message of a conversation.

prefix = system text and earlier messages as the model's chat template writes them, up to the
context; then the chunks; question = the last message. Chunks are used behind any prefix: as
approximations that fusion repairs. What people and models wrote is never read as control tokens: a
mark stands for it while the template is rendered, and its ids are put in the mark's place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrag.errors import InputError, ModelError
from kvrag.models.tokenizer import Tokenizer
from kvrag.prompting import PASSAGES, PromptLayout
from kvrag.text import check_text

__all__ = ["ROLES", "Conversation", "Message"]

#: `role` and `content`.
Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")

#: No text is in the template's input, so that none can be mistaken for a mark.
_MARK = re.compile("\u2063kvrag([0-9]+)\u2063")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of (role, text), neighbours of one role joined, and the question behind them."""

    turns: tuple[tuple[str, str], ...]
    question: str

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Conversation:
        """The last message must be the user's; messages without text say nothing.

        Raises:
            InputError: no list of messages, another role, or nothing asked at the end.
        """
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise InputError(f"messages must be a list, not {type(messages).__name__}")
        turns: list[tuple[str, str]] = []
        for index, message in enumerate(messages):
            role, text = _checked(index, message)
            if not text.strip():
                continue
            if turns and turns[-1][0] == role:
                text = f"{turns.pop()[1]}\n\n{text}"
            turns.append((role, text))
        if not turns or turns[-1][0] != "user":
            raise InputError("the last message with a text must be the user's")
        *before, (_, question) = turns
        return cls(tuple(before), question)

    def layout(
        self, tokenizer: Tokenizer, instruction: str, *, with_passages: bool
    ) -> PromptLayout:
        """Where the prompt's parts go; `instruction` is the system text where none is given.

        Without passages, a model with a chat template gets no instruction and the bare question.

        Raises:
            InputError: the chat template refuses the conversation, or does not show all of it.
        """
        if not tokenizer.has_chat_template:
            text = self._transcript(instruction) + (PASSAGES if with_passages else "")
            return PromptLayout((*tokenizer.bos_ids, *tokenizer.encode(text)), (), tokenizer)
        turns = self.turns
        if with_passages and not any(role == "system" for role, _ in turns):
            turns = (("system", instruction), *turns)
        head, tail = _rendered(tokenizer, turns)
        if with_passages:
            head += tokenizer.encode_template(PASSAGES)
        if not head:
            raise InputError("the model's chat template writes nothing in front of the question")
        return PromptLayout(tuple(head), tuple(tail), tokenizer, bare=not with_passages)

    def _transcript(self, instruction: str) -> str:
        """For a model that continues a text."""
        forms = {"system": "{}\n\n", "user": "Question: {}\n", "assistant": "Answer: {}\n\n"}
        turns = self.turns
        if not any(role == "system" for role, _ in turns):
            turns = (("system", instruction), *turns)
        return "".join(forms[role].format(text) for role, text in turns)


def _checked(index: int, message: object) -> tuple[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise InputError(f"message {index} must have 'role' and 'content' and nothing else")
    if message["role"] not in ROLES:
        raise InputError(
            f"message {index} has the role {message['role']!r:.50}; roles are {', '.join(ROLES)}"
        )
    return message["role"], check_text(f"the content of message {index}", message["content"])


def _rendered(
    tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]
) -> tuple[list[int], list[int]]:
    """Ids before and behind the question."""
    failures: list[str] = []
    texts = [text for _, text in turns]
    for messages in _forms([role for role, _ in turns]):
        try:
            parts = _MARK.split(tokenizer.render_chat(messages))
        except ModelError as exc:
            failures.append(str(exc))
            continue
        # Text, number, text, number, …, text. Some write the system text into the last turn.
        shown = [int(number) for number in parts[1::2]]
        if sorted(shown) != list(range(len(texts) + 1)) or shown[-1] != len(texts):
            failures.append("the model's chat template does not show every message once")
            continue
        ids: list[int] = []
        for written, number in zip(parts[::2], shown[:-1], strict=False):
            ids += tokenizer.encode_template(written) + tokenizer.encode(texts[number])
        return ids + tokenizer.encode_template(parts[-3]), tokenizer.encode_template(parts[-1])
    raise InputError("; ".join(dict.fromkeys(failures)))


def _forms(roles: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Messages of marks. The usual form first, then those for templates that refuse it.

    Some know no system message, so that its text goes in front of the user's; some read a content
    as a list of parts alone.
    """
    marked = [(role, f"\u2063kvrag{number}\u2063") for number, role in enumerate((*roles, "user"))]
    folded = [marked]
    if len(marked) > 1 and [role for role, _ in marked[:2]] == ["system", "user"]:
        folded.append([("user", f"{marked[0][1]}\n\n{marked[1][1]}"), *marked[2:]])
    for as_parts in (False, True):
        for turns in folded:
            yield [
                {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
                for role, text in turns
            ]
