"""Text into the terms of the lexical index: the same function for chunks and for questions.

Words of scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) become
overlapping pairs of characters. Stemming is the index's own: Porter's, which is English.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

__all__ = ["TERMS_VERSION", "terms"]

#: Changes with what `terms` returns; an index of another version is built again.
TERMS_VERSION = 1

_LONGEST_TERM = 64
_ACCENTS = re.compile("[\u0300-\u036f]")
#: Hiragana, katakana, Han with its extensions; Thai and Lao; Burmese; Khmer.
_UNSPACED = re.compile(
    "[\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff]+"
)


def terms(text: str) -> list[str]:
    """The terms of `text` in order, repeated as often as they come.

    Letters, digits and marks in runs, in compatibility form (NFKC), case-folded, without the
    accents of Latin, Greek and Cyrillic letters; of longer ones, the first 64 characters.
    """
    plain = _ACCENTS.sub("", unicodedata.normalize("NFKD", text).casefold())
    found: list[str] = []
    for word in _words().findall(unicodedata.normalize("NFKC", plain)):
        found.extend(_parts(word))
    return found


def _parts(word: str) -> Iterator[str]:
    position = 0
    for run in _UNSPACED.finditer(word):
        if run.start() > position:
            yield word[position : run.start()][:_LONGEST_TERM]
        characters = run.group()
        if len(characters) == 1:
            yield characters
        for first in range(len(characters) - 1):
            yield characters[first : first + 2]
        position = run.end()
    if position < len(word):
        yield word[position:][:_LONGEST_TERM]


@cache
def _words() -> re.Pattern[str]:
    """Runs of letters, digits and marks: vowel signs of Indic scripts are marks, not letters."""
    marks = "".join(
        chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M"
    )
    return re.compile(f"(?:[^\\W_]|[{marks}])+")
