"""What the first who needed it fixed for a namespace of a home, in its catalog, for all others.

It is part of what blocks are computed behind: made anew at each start, it would make the blocks of
the day before strangers. What others read and what is written are one step, also among processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from kvrag.blocks import DEFAULT_CONTEXT
from kvrag.config import Settings
from kvrag.models.tokenizer import Tokenizer
from kvrag.prompting import PromptLayout
from kvrag.retrieval.catalog import Catalog

__all__ = ["Fixed"]

#: Catalog settings that hold what a corpus's chunks are computed behind: the system text, passages.
_CORPUS_INSTRUCTION, _CORPUS_CONTEXT = "corpus_instruction", "corpus_context"


class Fixed:
    """Settings in the catalog that are written once. Thread-safe."""

    def __init__(self, catalog: Catalog, settings: Settings, tokenizer: Tokenizer) -> None:
        self._catalog, self._settings, self._tokenizer = catalog, settings, tokenizer

    def first(self, name: str, make: Callable[[], str]) -> str:
        """The value of `name`, made now if nobody has needed it before."""
        namespace = self._settings.namespace
        stored = self._catalog.setting(namespace, name)
        if stored is not None:
            return stored
        return self._catalog.set_setting(namespace, name, make(), overwrite=False)

    def layout(self, instruction: str) -> PromptLayout:
        """The layout as this home first rendered it: a template may write the date.

        The prefix is part of every block key, so a new day must not make all blocks strangers.
        """
        tokenizer = self._tokenizer
        digest = hashlib.blake2b(instruction.encode(), digest_size=16).hexdigest()
        return PromptLayout.loads(
            self.first(
                f"layout {tokenizer.digest} {tokenizer.template_digest} {digest}",
                lambda: PromptLayout.of(tokenizer, instruction).dumps(),
            ),
            tokenizer,
        )

    @property
    def context(self) -> str:
        """The passages that chunks are computed behind where no corpus says otherwise."""
        given = self._settings.corpus_context
        return DEFAULT_CONTEXT if given is None else given

    @property
    def corpus_instruction(self) -> str | None:
        """The system text that the corpus was made with; None until it is made.

        It is written last: where there is one, the rest is there.
        """
        return self._catalog.setting(self._settings.namespace, _CORPUS_INSTRUCTION)

    def corpus_context(self, made_with: str | None) -> str:
        """The passages of a corpus of that instruction.

        One that has its instruction and no context was made when none was known.
        """
        stored = self._catalog.setting(self._settings.namespace, _CORPUS_CONTEXT)
        if stored is not None:
            return stored
        return self.context if made_with is None else ""

    def make_corpus(self) -> None:
        """What chunks are computed behind is fixed by whoever makes the corpus."""
        made_with = self.corpus_instruction
        self.first(_CORPUS_CONTEXT, lambda: self.corpus_context(made_with))
        self.first(_CORPUS_INSTRUCTION, lambda: self._settings.instruction)
