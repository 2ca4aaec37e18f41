"""The layout of a prompt: what stands before the chunks, and what behind them.

prefix = the chat template up to the context; then the chunks; question = the rest with the
generation prompt. Each part is encoded alone and their ids are joined, so stored token ids stay
valid whatever stands around them. A model without a chat template, which continues a text, gets
instruction, chunks and question as plain text that ends where the answer begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvrag.errors import ModelError
from kvrag.models.tokenizer import Tokenizer

__all__ = ["PASSAGES", "PromptLayout"]

#: Stands for the user's part while the template is rendered; no template or question contains it.
_MARK = "\u2063kvrag\u2063"
#: Stands in front of the chunks.
PASSAGES = "Passages:\n\n"


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """Ids around the chunks, for one tokenizer and one instruction.

    `prefix_ids` is at the same time the default corpus prefix. bare: a question is not called one,
    since nothing stands in front of it.
    """

    prefix_ids: tuple[int, ...]
    _tail_ids: tuple[int, ...]
    _tokenizer: Tokenizer
    bare: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer, instruction: str) -> PromptLayout:
        """Render the model's chat template once and cut it.

        A template's text is taken as it is: where it writes no BOS, the prompt has none.

        Raises:
            ModelError: the template fails, or does not show the user's text exactly once.
        """
        if not tokenizer.has_chat_template:
            text = tokenizer.encode(f"{instruction}\n\n{PASSAGES}")
            return cls((*tokenizer.bos_ids, *text), (), tokenizer)
        head, tail = _cut_template(tokenizer, instruction)
        return cls(
            tuple(tokenizer.encode_template(head + PASSAGES)),
            tuple(tokenizer.encode_template(tail)),
            tokenizer,
        )

    def dumps(self) -> str:
        """The layout's ids as text, for `loads`."""
        return json.dumps([self.prefix_ids, self._tail_ids])

    @classmethod
    def loads(cls, text: str, tokenizer: Tokenizer) -> PromptLayout:
        """A layout that was written by `dumps` for the same tokenizer."""
        prefix_ids, tail_ids = json.loads(text)
        return cls(tuple(prefix_ids), tuple(tail_ids), tokenizer)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer where the request names none.

        A model that continues a text goes on behind its answer, with a question of its own.
        """
        return () if self._tokenizer.has_chat_template else ("\n\n",)

    def question_ids(self, question: str) -> tuple[int, ...]:
        """Ids behind the last chunk: the question, the template's rest, the generation prompt."""
        text = question.strip() if self.bare else f"Question: {question.strip()}"
        if not self._tokenizer.has_chat_template:
            text += "\nAnswer:"
        return (*self._tokenizer.encode(text), *self._tail_ids)


def _cut_template(tokenizer: Tokenizer, instruction: str) -> tuple[str, str]:
    """What the template writes before and behind the user's part.

    Raises:
        ModelError: no form of the messages is shown whole; says what became of each.
    """
    failures: list[str] = []
    for messages in _message_forms(instruction):
        try:
            text = tokenizer.render_chat(messages)
        except ModelError as exc:
            failures.append(str(exc))
            continue
        parts = text.split(_MARK)
        if len(parts) != 2:
            failures.append(
                f"the chat template shows the user's message {len(parts) - 1} times, not once"
            )
        elif instruction.strip() not in text:
            failures.append("the chat template leaves the system message out")
        else:
            return parts[0], parts[1]
    raise ModelError("; ".join(dict.fromkeys(failures)))


def _message_forms(instruction: str) -> Iterator[list[dict[str, Any]]]:
    """The usual form first, then what templates want that refuse or ignore parts of it.

    Some know no system message, so that the instruction goes in front of the user's text; some
    read a content as a list of parts alone.
    """
    system, user = ("system", instruction), ("user", _MARK)
    folded = ("user", f"{instruction}\n\n{_MARK}")
    for as_parts in (False, True):
        for turns in ([system, user], [folded]):
            yield [
                {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
                for role, text in turns
            ]
