"""The passages that a corpus's chunks are computed behind, so that they expect to stand among some.

What they tell does not matter: passages of the corpus itself do no better (docs/fusion.md). They
are in no prompt; their own KV is dropped.
"""

from __future__ import annotations

import re

from kvrag.errors import InputError, SettingsError
from kvrag.models.tokenizer import Tokenizer
from kvrag.retrieval.chunking import render_chunk
from kvrag.text import check_text

__all__ = ["DEFAULT_CONTEXT", "context_ids"]

#: Every chunk is computed behind them, and more than a few hundred bring nothing.
MOST_TOKENS = 2048

_EMPTY_LINES = re.compile(r"\n\s*\n")

#: A title, a line break, a text; an empty line between passages.
DEFAULT_CONTEXT = """\
Granite
Granite is a coarse-grained igneous rock made mostly of quartz, feldspar and mica. It \
forms when magma rich in silica cools slowly below the surface, and it is quarried in \
many countries for buildings, bridges and kerbs. The oldest known pieces are more than \
four billion years old.

Harbour of Velmo
The harbour of Velmo was opened in 1874 on the northern bank of the river, two \
kilometres from the town hall. Its three basins served the timber trade until 1931, when \
the railway took most of the freight. Since 1996 the warehouses have housed a museum, a \
school of music and about two hundred flats.

Anna Lindqvist
Anna Lindqvist (born 12 March 1902, died 4 July 1981) was a botanist and writer. She \
studied in Uppsala and Leiden, led expeditions to the mountains of Peru in the 1930s, \
and described forty-one species of orchids. Her book on the flora of the high valleys \
was translated into nine languages and won a national prize in 1954.

1968 Regional League
The 1968 season was the twenty-third of the league. Sixteen teams took part; each met \
every other twice. The title went to the club from the capital with fifty-one points, \
and the last two teams were relegated. The top scorer was a forward with twenty-four \
goals, a record that stood for eleven years.

The Long Evening
The Long Evening is a film from 1979, directed by Peter Marsh and written with his \
sister. It tells of a family that returns to its village after the war, and was shown at \
festivals in Venice and Toronto. The music was recorded by an orchestra of forty \
players, and the record sold more copies than the film had viewers.

Council of the Isles
The council is the governing body of the islands. Its thirty members are elected every \
four years, and they choose a chair and five ministers from among themselves. The \
council decides on fisheries, schools and roads, while defence and foreign affairs \
remain with the mainland's government under the treaty of 1921.
"""


def context_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids of the passages of `text`; none if it is blank.

    Empty lines, one or more, stand between passages. How many ids there are depends on no setting
    of the model's context: a corpus would lose its blocks by another one.

    Raises:
        SettingsError: more than `MOST_TOKENS`, or no valid text.
    """
    try:
        check_text("setting 'corpus_context'", text)
    except InputError as exc:
        raise SettingsError(str(exc)) from exc
    passages = (passage.strip() for passage in _EMPTY_LINES.split(text))
    # A title stands on a line of its own, here as in a rendered chunk.
    rendered = [render_chunk("", passage) for passage in passages if passage]
    token_ids = tuple(token_id for text in rendered for token_id in tokenizer.encode(text))
    if len(token_ids) > MOST_TOKENS:
        raise SettingsError(
            f"setting 'corpus_context' takes {len(token_ids)} tokens; at most {MOST_TOKENS} are "
            "allowed, and a few hundred are enough"
        )
    return token_ids
