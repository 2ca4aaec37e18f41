"""The prompts of speed benchmarks: random passages of an exact number of tokens.

No prompt begins like another behind the system text, so that a prefix cache finds that text alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvrag.errors import InputError
from kvrag.models.tokenizer import Tokenizer
from kvrag.passages import passage_chunks

__all__ = ["DrawnPrompt", "Prompts"]

_QUESTION_WORDS = 8


@dataclass(frozen=True, slots=True)
class DrawnPrompt:
    """Passages and a question; `follow_up` is another question about the same passages."""

    passages: tuple[str, ...]
    question: str
    follow_up: str


class Prompts:
    """Draws prompts over a pool of passages, made of the tokenizer's own whole words."""

    def __init__(self, tokenizer: Tokenizer, *, pool: int, chunk_tokens: int, seed: int) -> None:
        self._tokenizer, self._chunk_tokens = tokenizer, chunk_tokens
        self._rng = random.Random(seed)
        self._words = list(self._whole_words())
        self.pool = [self._passage() for _ in range(pool)]
        self._unused_firsts = self._rng.sample(self.pool, pool)

    def next(self, chunks: int) -> DrawnPrompt:
        """A prompt of `chunks` passages that begins with one that began none before.

        Raises:
            InputError: every passage of the pool has been the first of a prompt.
        """
        if not self._unused_firsts:
            raise InputError(f"a pool of {len(self.pool)} passages begins that many prompts")
        first = self._unused_firsts.pop()
        others = [passage for passage in self.pool if passage != first]
        passages = (first, *self._rng.sample(others, chunks - 1))
        return DrawnPrompt(passages, self._question(), self._question())

    def tokens(self, passages: Sequence[str]) -> list[int]:
        """The number of tokens of each passage."""
        return [len(chunk.token_ids) for chunk in passage_chunks(passages, self._tokenizer)]

    def _question(self) -> str:
        return f"What is said about{''.join(self._rng.choices(self._words, k=_QUESTION_WORDS))}?"

    def _whole_words(self) -> Iterator[str]:
        """Words that, with a space in front, are one token."""
        for token_id in range(self._tokenizer.vocab_size):
            word = self._tokenizer.decode([token_id])
            if word[:1] == " " and len(word) > 3 and word[1:].isascii() and word[1:].isalpha():
                yield word

    def _passage(self) -> str:
        words = self._rng.choices(self._words, k=self._chunk_tokens)
        while sum(self.tokens(["".join(words)])) > self._chunk_tokens:
            words.pop()
        return "".join(words)
