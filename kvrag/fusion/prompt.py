"""A prompt as fusion sees it: prefix, chunks and question, every token with one position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ChunkSpan", "Prompt"]


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """A chunk's token ids and the position of the first of them."""

    token_ids: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids in order; their concatenation *is* the prompt under every strategy.

    `prefix_match`: the prompt's prefix is the one that the blocks were computed behind. Then the
    first chunk's stored KV is what full prefill would compute, and needs no repair.
    """

    prefix_ids: tuple[int, ...]
    chunks: tuple[ChunkSpan, ...]
    question_ids: tuple[int, ...]
    prefix_match: bool

    @classmethod
    def build(
        cls,
        prefix_ids: Sequence[int],
        chunks: Sequence[Sequence[int]],
        question_ids: Sequence[int],
        *,
        prefix_match: bool,
    ) -> Prompt:
        """Place the segments one behind the other.

        Raises:
            ValueError: prefix, question or a chunk is empty.
        """
        if not prefix_ids or not question_ids or not all(chunks):
            raise ValueError("a prompt needs a prefix, a question, and no empty chunk")
        spans, position = [], len(prefix_ids)
        for token_ids in chunks:
            spans.append(ChunkSpan(tuple(token_ids), position))
            position = spans[-1].end
        return cls(tuple(prefix_ids), tuple(spans), tuple(question_ids), prefix_match)

    @property
    def question_start(self) -> int:
        return self.chunks[-1].end if self.chunks else len(self.prefix_ids)

    @property
    def length(self) -> int:
        return self.question_start + len(self.question_ids)

    @property
    def context_tokens(self) -> int:
        """Tokens of the chunks."""
        return self.question_start - len(self.prefix_ids)

    @property
    def repairable(self) -> range:
        """Positions of the context tokens whose stored KV may differ from full prefill's."""
        exact = self.prefix_match and self.chunks
        return range(self.chunks[0].end if exact else len(self.prefix_ids), self.question_start)

    @property
    def token_ids(self) -> tuple[int, ...]:
        chunks = (token_id for chunk in self.chunks for token_id in chunk.token_ids)
        return (*self.prefix_ids, *chunks, *self.question_ids)
