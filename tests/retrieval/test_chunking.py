from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrag.retrieval import Chunker, Document, DocumentError, render_chunk
from kvrag.retrieval._long_lines import cut_long_lines


def count_bytes(text: str) -> int:
    """A tokenizer of four bytes a token."""
    return -(-len(text.encode()) // 4)


def count_not_monotone(text: str) -> int:
    """Parts may have more tokens than the whole, as with merges and normalisation."""
    return count_bytes(text) + (20 if len(text) % 7 == 0 else 0)


def solid(text: str) -> str:
    return "".join(text.split())


HARD_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400),
    st.lists(
        st.sampled_from(
            [
                "Word ",
                "end. ",
                "\n\n",
                "# Head\n",
                "- item\n",
                "漢字",
                "。",
                "👩‍👩‍👧‍👦",
                "🇩🇪",
                "e\u0301",
                "x" * 90,
            ]
        ),
        min_size=1,
        max_size=150,
    ).map("".join),
)


@settings(max_examples=150, deadline=None)
@given(
    text=HARD_TEXT,
    title=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    source=st.sampled_from(["a.txt", "a.md"]),
    count=st.sampled_from([count_bytes, count_not_monotone]),
)
def test_bound_holds_and_nothing_is_lost(text, title, source, count):
    if not text.strip():
        return
    document = Document(text, title, source)
    pieces = Chunker(count, 40).split(document)
    for piece in pieces:
        assert piece.text.strip()
        assert count(render_chunk(piece.title, piece.text)) <= 40
        assert document.title.startswith(piece.title)
    assert solid("".join(piece.text for piece in pieces)) == solid(text)


def test_layout():
    assert render_chunk("T", "x") == "T\nx\n\n"
    assert render_chunk("", "x") == "x\n\n"


def test_breaks_at_paragraphs_and_sentences():
    sentence = "The keeper winds the clock every ninth evening. "
    text = "\n\n".join([sentence * 3] * 6).strip()
    pieces = Chunker(count_bytes, 64).split(Document(text, "Clock"))
    assert len(pieces) > 3
    assert all(piece.text.startswith("The keeper") for piece in pieces)
    assert all(piece.text.endswith("evening.") for piece in pieces)


def test_markdown_breaks_at_headings():
    text = "".join(f"## Part {i}\n\n{'word ' * 25}\n\n" for i in range(5))
    pieces = Chunker(count_bytes, 48).split(Document(text, "T", "a.md"))
    assert [piece.text.split("\n")[0] for piece in pieces] == [f"## Part {i}" for i in range(5)]


def test_long_titles_are_cut_to_whole_words_or_dropped():
    chunker = Chunker(count_bytes, 32)
    (piece,) = chunker.split(Document("body", "eleven chars " * 50))
    assert count_bytes(piece.title + "\n") <= 16
    assert piece.title.split() == (["eleven", "chars"] * 5)[: len(piece.title.split())]
    assert len(piece.title.split()) > 6
    (piece,) = chunker.split(Document("body", "w" * 100_000))
    assert piece.title == ""


def test_a_character_that_does_not_fit_is_an_error():
    with pytest.raises(DocumentError, match="'b' alone"):
        Chunker(lambda text: 100 if "b" in text else 1, 40).split(Document("a b c"))


def test_small_budgets_are_refused():
    with pytest.raises(ValueError, match="at least 32"):
        Chunker(count_bytes, 31)


def test_errors_of_the_tokenizer_come_through():
    def broken(text: str) -> int:
        raise KeyError(text)

    with pytest.raises(KeyError):
        Chunker(broken).split(Document("body"))


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_long_lines_are_cut_and_put_together_again(seed):
    units = ["漢", "x", "👍🏽", " ", ". ", "🇩🇪", "\n" * (seed % 2)]
    text = "".join(units[(seed >> shift) % len(units)] * 1500 for shift in range(24))
    sections = list(cut_long_lines(text))
    assert "".join(sections) == text
    longest = max(len(line) for section in sections for line in section.split("\n"))
    assert longest <= 16384


def test_short_lines_are_not_cut():
    text = "a line\n" * 100_000
    assert list(cut_long_lines(text)) == [text]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", ["x", "漢字仮名", "Some words in a row. ", "A line\n"])
def test_time_grows_with_the_length(unit):
    """300,000 CJK characters in one line took a minute before long lines were cut."""
    text = unit * (300_000 // len(unit))
    begin = time.perf_counter()
    pieces = Chunker(count_bytes).split(Document(text))
    seconds = time.perf_counter() - begin
    assert solid("".join(piece.text for piece in pieces)) == solid(text)
    assert seconds < 20, f"{seconds:.1f} s for {len(text)} characters"
