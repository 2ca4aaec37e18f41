"""Documents into chunks of a bounded number of tokens, and the one layout of a chunk in a prompt.

The counting function is the tokenizer's; nothing else of a tokenizer is known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath

from ._long_lines import cut_long_lines
from .documents import Document
from .errors import DocumentError, needs_extra

__all__ = ["Chunker", "Piece", "render_chunk"]

_MIN_TOKENS = 32
_MARKDOWN = frozenset({".md", ".markdown"})
# More characters than this per allowed token are counted by their beginning first: the splitter
# asks about whole sections, and tokenizing a megabyte to learn "too long" is most of the time.
_PROBE_CHARS_PER_TOKEN = 16
_MEMO_TEXTS = 1024  # the splitter asks two times in five about a text it asked about before


@dataclass(frozen=True, slots=True)
class Piece:
    """One chunk's own title (perhaps shortened, perhaps "") and its part of the text."""

    title: str
    text: str


def render_chunk(title: str, text: str) -> str:
    """The chunk as it stands in a prompt: title line if there is a title, text, an empty line.

    This is the only place that knows the layout. Stored token ids are those of this string.
    """
    return f"{title}\n{text}\n\n" if title else f"{text}\n\n"


class Chunker:
    """Splits documents so that every rendered chunk has at most `max_tokens` tokens.

    count_tokens: the tokens of a string, exactly as the prompt will hold it
    max_tokens:   the bound on `count_tokens(render_chunk(piece.title, piece.text))`, at least 32

    Breaks fall at headings, paragraphs, lines or sentences where possible, then at words, then at
    characters. A title that alone takes more than half of `max_tokens` is cut to the longest run of
    its first words that does not, or dropped when the first word is too long already.

    Thread-safe if `count_tokens` is. Raises MissingExtraError without semantic-text-splitter.
    """

    def __init__(self, count_tokens: Callable[[str], int], max_tokens: int = 256) -> None:
        if max_tokens < _MIN_TOKENS:
            raise ValueError(f"max_tokens must be at least {_MIN_TOKENS}, got {max_tokens}")
        with needs_extra("semantic-text-splitter", "chunking"):
            from semantic_text_splitter import MarkdownSplitter, TextSplitter
        self._text_splitter = TextSplitter
        self._markdown_splitter = MarkdownSplitter
        self._count_tokens = count_tokens
        self.max_tokens = max_tokens

    def split(self, document: Document) -> list[Piece]:
        """The document's chunks in order, at least one.

        The texts of the pieces, put together, hold every non-whitespace character of the document
        once and in order; whitespace at the breaks is dropped. A document whose source ends in .md
        or .markdown is split along its Markdown structure.

        Raises DocumentError if one character alone has more than `max_tokens` tokens.
        """
        title = self._fitting_title(document.title)

        @lru_cache(maxsize=_MEMO_TEXTS)
        def measure_short(text: str) -> int:
            return self._count_tokens(render_chunk(title, text))

        def measure(text: str) -> int:
            probe = text[: self.max_tokens * _PROBE_CHARS_PER_TOKEN]
            num_tokens = measure_short(probe)
            if len(probe) == len(text) or num_tokens > self.max_tokens:
                return num_tokens
            return self._count_tokens(render_chunk(title, text))

        is_markdown = PurePath(document.source).suffix.lower() in _MARKDOWN
        kind = self._markdown_splitter if is_markdown else self._text_splitter
        splitter = kind.from_callback(measure, self.max_tokens)
        texts: list[str] = []
        for section in cut_long_lines(document.text):
            for text in splitter.chunks(section):
                # The splitter trusts that a part has no more tokens than the whole, and emits a
                # unit it cannot divide as it is. The bound must hold without either.
                texts.extend(self._halved(text, measure))
        return [Piece(title, text) for text in texts]

    def _fitting_title(self, title: str) -> str:
        limit = self.max_tokens // 2
        words = title.split()[: limit + 1]  # a word has at least one token
        fitting = 0
        too_many = len(words) + 1
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            candidate = " ".join(words[:middle])
            if len(candidate) <= limit * _PROBE_CHARS_PER_TOKEN and (
                self._count_tokens(f"{candidate}\n") <= limit
            ):
                fitting = middle
            else:
                too_many = middle
        return " ".join(words[:fitting])

    def _halved(self, text: str, measure: Callable[[str], int]) -> list[str]:
        """`text` in as few halvings as make every part fit; usually none."""
        fitting: list[str] = []
        pending = [text]
        while pending:
            part = pending.pop().strip()
            if not part:
                continue
            if measure(part) <= self.max_tokens:
                fitting.append(part)
            elif len(part) == 1:
                raise DocumentError(
                    f"the character {part!r} alone needs more than {self.max_tokens} tokens"
                )
            else:
                middle = len(part) // 2
                space = part.rfind(" ", 1, middle)
                cut = space if space > middle // 2 else middle
                pending += [part[cut:], part[:cut]]
        return fitting
