"""The layout of a prompt: the chat template cut where the context stands.

prefix = template up to the context; then the chunks; question = the rest with the generation
prompt. Each part is encoded alone and their ids are joined, so stored token ids stay valid
whatever stands around them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from kvrag.errors import ModelError
from kvrag.models.tokenizer import Tokenizer

__all__ = ["PromptLayout"]

#: Stands for the user's part while the template is rendered; no template or question contains it.
_MARK = "\u2063kvrag\u2063"


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """Ids around the chunks, for one tokenizer and one instruction.

    `prefix_ids` is at the same time the default corpus prefix.
    """

    prefix_ids: tuple[int, ...]
    _tail_ids: tuple[int, ...]
    _tokenizer: Tokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer, instruction: str) -> PromptLayout:
        """Render the model's chat template once and cut it.

        Raises:
            ModelError: no chat template, or one that does not show the user's text exactly once.
        """
        messages = [
            {"role": "system", "content": instruction},
            {"role": "user", "content": _MARK},
        ]
        parts = tokenizer.render_chat(messages).split(_MARK)
        if len(parts) != 2:
            raise ModelError(
                f"the chat template shows the user's message {len(parts) - 1} times, not once"
            )
        head, tail = parts
        return cls(
            tuple(tokenizer.encode_template(head + "Passages:\n\n")),
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

    def question_ids(self, question: str) -> tuple[int, ...]:
        """Ids behind the last chunk: the question, the template's rest, the generation prompt."""
        return (*self._tokenizer.encode(f"Question: {question.strip()}"), *self._tail_ids)
