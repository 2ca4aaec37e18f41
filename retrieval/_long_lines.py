"""Cutting very long lines before the splitter sees them.

semantic-text-splitter looks for word boundaries over the whole of a unit it cannot divide at
sentences, once for every chunk: a line of 300,000 CJK characters without punctuation takes a
minute, and time grows with the square. Cut beforehand, it grows with the length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_WINDOW_CHARS = 8192
_SENTENCE_END = re.compile(r"[.!?…][\"')\]]*\s|[\u3002\uff01\uff1f]")  # the last three: CJK
_JOINERS = "\u200d\ufe0e\ufe0f"  # zero width joiner, text and emoji variation selectors
_LONGEST_CLUSTER = 32


def cut_long_lines(text: str) -> Iterator[str]:
    """Yield `text` in sections that, put together, are `text`; most often one section, all of it.

    Lines of at most 16,384 characters are never cut. A longer one is cut at the last sentence end,
    else the last space, of the second half of each window, else between two characters.
    """
    start = 0
    for line_start, line_end in _lines(text):
        position = line_start
        while line_end - position > 2 * _WINDOW_CHARS:
            position = _cut(text, position + _WINDOW_CHARS // 2, position + _WINDOW_CHARS)
            yield text[start:position]
            start = position
    yield text[start:]


def _lines(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end + 1
        yield start, end
        start = end


def _cut(text: str, earliest: int, latest: int) -> int:
    """A position in (earliest, latest] to cut at."""
    sentence_end = 0
    for match in _SENTENCE_END.finditer(text, earliest, latest):
        sentence_end = match.end()
    if sentence_end:
        return sentence_end
    space = text.rfind(" ", earliest, latest)
    if space > 0:
        return space + 1
    for position in range(latest, latest - _LONGEST_CLUSTER, -1):
        if not _joins(text[position - 1], text[position]):
            return position
    return latest


def _joins(before: str, after: str) -> bool:
    """Whether the two are likely one visible character: close to a grapheme rule, and cheap."""
    return (
        before == "\u200d"
        or after in _JOINERS
        or unicodedata.combining(after) != 0
        or "\U0001f3fb" <= after <= "\U0001f3ff"  # skin tones
        or "\U0001f1e6" <= after <= "\U0001f1ff"  # halves of flags
    )
