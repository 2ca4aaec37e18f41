"""Stop texts: what a stream lets through is the whole text up to the first stop text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrag.generation.stopping import StopTexts

LETTERS = st.text("ab.\n", max_size=25)
STOPS = st.lists(st.text("ab.\n", min_size=1, max_size=4), max_size=3)


def stream(pieces, stop):
    """What comes out, and whether it was cut."""
    stops, out = StopTexts(stop), []
    for piece in pieces:
        out.append(stops.push(piece))
        if stops.found:
            return "".join(out), True
    return "".join(out) + stops.flush(), False


def cut(text, stop):
    """The text before the stop text that is complete first; of those, the one that begins first."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


def split(text, cuts):
    borders = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


@settings(max_examples=500)
@given(text=LETTERS, stop=STOPS, cuts=st.lists(st.integers(0, 100), max_size=10))
@example(text="ab", stop=["b", "ab"], cuts=[])
@example(text="abab.b", stop=["ab.b", "b."], cuts=[3])
def test_any_pieces_equal_the_cut_of_the_whole(text, stop, cuts):
    """One result, however the tokens happen to cut the text.

    With a stop text inside another ("b" in "abb"), a text that came in one piece was cut at the one
    that begins first, and the same text in small pieces at the one that is complete first.
    """
    assert stream(split(text, cuts), stop) == cut(text, stop)


@settings(max_examples=300)
@given(text=LETTERS, stop=st.text("ab.\n", min_size=1, max_size=5), cuts=st.lists(st.integers(0)))
def test_one_stop_text(text, stop, cuts):
    before, found, _ = text.partition(stop)
    assert stream(split(text, cuts), [stop]) == (before, bool(found))


@given(pieces=st.lists(st.text(max_size=5)))
def test_no_stop_texts_hold_nothing_back(pieces):
    stops = StopTexts(())
    assert [stops.push(piece) for piece in pieces] == pieces
    assert stops.flush() == ""
    assert not stops.found


def test_text_is_held_no_longer_than_needed():
    stops = StopTexts(["\n\nQ:"])
    assert stops.push("answer\n") == "answer"
    assert stops.push("\n") == ""
    assert stops.push("A") == "\n\nA"
    assert stops.push("\n\nQ") == ""
    assert stops.flush() == "\n\nQ"
    assert stops.flush() == ""


@pytest.mark.parametrize("stop", ["🚢", "é", "東京"])
def test_stop_text_of_several_bytes(stop):
    assert stream(["x", stop, "y"], [stop]) == ("x", True)
