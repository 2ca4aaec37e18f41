"""Prompts to check with: laid out by the engine, then cut, turned round or changed as token ids."""

from __future__ import annotations

from collections.abc import Sequence

from kvrag.engine import Engine
from kvrag.errors import InputError
from kvrag.fusion import Prompt
from kvrag.passages import passage_chunks
from kvrag.verify.texts import Text

__all__ = ["cut", "laid_out", "with_chunks"]

#: Fewer tokens of each passage say nothing.
_FEWEST_TOKENS = 16


def laid_out(engine: Engine, text: Text, new_tokens: int) -> Prompt:
    """The prompt of one text; where the context is too short for it, of its passages' beginnings.

    Raises:
        InputError: the context is too short for that, too.
    """
    passages = [{"title": title, "text": content} for title, content in text.passages]
    prompt = engine.prompt(text.question, passages, new_tokens=new_tokens)
    chunks = [chunk.token_ids for chunk in passage_chunks(passages, engine.model.tokenizer)]
    context = engine.model.decoder.config.max_positions
    room = context - len(prompt.prefix_ids) - len(prompt.question_ids) - new_tokens
    if sum(map(len, chunks)) > room:
        share = room // len(chunks)
        if share < _FEWEST_TOKENS:
            raise InputError(
                f"the context of {context} tokens leaves {share} for each of {len(chunks)} "
                f"passages; {_FEWEST_TOKENS} are needed to check blending"
            )
        chunks = [token_ids[:share] for token_ids in chunks]
    return with_chunks(prompt, chunks)


def cut(prompt: Prompt, chunks: int, tokens: int, question_tokens: int) -> Prompt:
    """The first `tokens` of each of the first `chunks`, and the end of the question.

    What is exact is so at any length.
    """
    return Prompt.build(
        prompt.prefix_ids,
        [span.token_ids[:tokens] for span in prompt.chunks[:chunks]],
        prompt.question_ids[-question_tokens:],
        prefix_match=True,
    )


def with_chunks(prompt: Prompt, chunks: Sequence[Sequence[int]]) -> Prompt:
    """`prompt` with other chunks."""
    return Prompt.build(prompt.prefix_ids, chunks, prompt.question_ids, prefix_match=True)
