"""What chunks are computed behind: whole passages, bounded, the last ones first to be kept."""

from __future__ import annotations

import pytest

from kvrag.blocks import DEFAULT_CONTEXT, context_ids
from kvrag.retrieval.chunking import render_chunk

PLOVER = "Silver Plover\nA bird of cold coasts."
GRANITE = "Granite\nA coarse rock."
BARE = "No title, one line."


class Bytes:
    """Each byte is a token."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def context(text: str, positions: int = 10**6) -> str:
    return bytes(context_ids(text, Bytes(), positions)).decode()


def test_passages_stand_in_their_order_as_chunks_are_rendered():
    titled = [render_chunk(*passage.split("\n")) for passage in (PLOVER, GRANITE)]
    assert context(f"{PLOVER}\n\n{GRANITE}\n") == "".join(titled)
    # Passages need no title.
    assert context(f"{BARE}\n\n{PLOVER}") == render_chunk("", BARE) + titled[0]
    assert context("Title\none\ntwo") == render_chunk("Title", "one\ntwo")


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\n \n\n"])
def test_no_text_is_no_context(text):
    assert context_ids(text, Bytes(), 8192) == ()


@pytest.mark.parametrize("gap", ["\n\n\n", "\n\n\n\n", "\n \n\n", "\r\n\r\n"])
def test_more_empty_lines_lose_no_passage(gap):
    """Two empty lines ended the context: all in front of them was dropped without a word."""
    assert context(f"\n{PLOVER}{gap}{BARE}\n\n\n") == context(f"{PLOVER}\n\n{BARE}")


def test_the_last_passages_that_fit_whole_into_an_eighth_are_kept():
    passages = [f"Title {n}\n{'x' * (10 + 7 * n)}" for n in range(6)]
    rendered = [passage + "\n\n" for passage in passages]
    text = "\n\n".join(passages)
    for kept in range(len(passages) + 1):
        expected = "".join(rendered[len(rendered) - kept :])
        enough = 8 * len(expected)
        assert context(text, enough) == expected
        # One token less, and the first of them goes, whole.
        if kept:
            assert context(text, enough - 1) == "".join(rendered[len(rendered) - kept + 1 :])


def test_a_short_passage_does_not_jump_over_a_long_one():
    assert context(f"{BARE}\n\n{'x' * 100}", 8 * 60) == ""


def test_the_default_is_titled_passages():
    passages = DEFAULT_CONTEXT.strip().split("\n\n")
    assert [len(passage.split("\n")) for passage in passages] == [2] * len(passages)
    assert context(DEFAULT_CONTEXT) == "".join(f"{passage}\n\n" for passage in passages)
