"""Passages that a caller brings along: each is one chunk, rendered like a stored one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvrag.encoded_texts import EncodedTexts
from kvrag.errors import InputError, PromptTooLongError
from kvrag.models.tokenizer import Tokenizer
from kvrag.prefill import ContextChunk
from kvrag.retrieval.chunking import render_chunk
from kvrag.text import check_text

__all__ = ["MAX_PASSAGE_TOKENS", "Passage", "passage_chunks"]

#: Longer passages are refused rather than split: their caller wants them whole.
MAX_PASSAGE_TOKENS = 2048

Passage = str | Mapping[str, str]


def passage_chunks(
    passages: Sequence[Passage], tokenizer: Tokenizer | EncodedTexts
) -> list[ContextChunk]:
    """Chunks of `passages`: texts, or mappings with `text` and perhaps `title`.

    Raises:
        InputError: no passages, one of a wrong form, or one without text.
        PromptTooLongError: a passage of more than `MAX_PASSAGE_TOKENS` tokens.
    """
    if isinstance(passages, str) or not isinstance(passages, Sequence):
        raise InputError(f"passages must be a list, not {type(passages).__name__}")
    if not passages:
        raise InputError("passages is empty; give at least one, or k to retrieve from the corpus")
    chunks = []
    for index, passage in enumerate(passages):
        title, text = _parts(index, passage)
        token_ids = tokenizer.encode(render_chunk(title, text))
        if len(token_ids) > MAX_PASSAGE_TOKENS:
            raise PromptTooLongError(
                f"passage {index} takes {len(token_ids)} tokens; at most {MAX_PASSAGE_TOKENS} are "
                "allowed (add longer texts as documents, which are split)"
            )
        chunks.append(
            ContextChunk(f"passage-{index}", None, title, text, tuple(token_ids), score=None)
        )
    return chunks


def _parts(index: int, passage: object) -> tuple[str, str]:
    if isinstance(passage, str):
        title, text = "", passage
    elif isinstance(passage, Mapping):
        if unknown := set(passage) - {"title", "text"}:
            raise InputError(
                f"passage {index} has unknown fields {sorted(map(str, unknown))}; "
                "allowed are 'title' and 'text'"
            )
        title, text = passage.get("title") or "", passage.get("text", "")
    else:
        raise InputError(
            f"passage {index} is {type(passage).__name__}; give a text or {{'title', 'text'}}"
        )
    title = check_text(f"passage {index}'s title", title)
    text = check_text(f"passage {index}'s text", text)
    if not text.strip():
        raise InputError(f"passage {index} has no text")
    return title, text
