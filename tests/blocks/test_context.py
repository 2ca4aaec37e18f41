"""What chunks are computed behind: all passages of a text, and not too many."""

from __future__ import annotations

import pytest

from kvrag.blocks import DEFAULT_CONTEXT, context_ids
from kvrag.errors import SettingsError
from kvrag.retrieval.chunking import render_chunk

PLOVER = "Silver Plover\nA bird of cold coasts."
GRANITE = "Granite\nA coarse rock."
BARE = "No title, one line."


class Bytes:
    """Each byte is a token."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def context(text: str) -> str:
    return bytes(context_ids(text, Bytes())).decode()


def test_passages_stand_in_their_order_as_chunks_are_rendered():
    titled = [render_chunk(*passage.split("\n")) for passage in (PLOVER, GRANITE)]
    assert context(f"{PLOVER}\n\n{GRANITE}\n") == "".join(titled)
    # Passages need no title.
    assert context(f"{BARE}\n\n{PLOVER}") == render_chunk("", BARE) + titled[0]
    assert context("Title\none\ntwo") == render_chunk("Title", "one\ntwo")


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\n \n\n"])
def test_no_text_is_no_context(text):
    assert context_ids(text, Bytes()) == ()


@pytest.mark.parametrize("gap", ["\n\n\n", "\n\n\n\n", "\n \n\n", "\r\n\r\n"])
def test_more_empty_lines_lose_no_passage(gap):
    """Two empty lines ended the context: all in front of them was dropped without a word."""
    assert context(f"\n{PLOVER}{gap}{BARE}\n\n\n") == context(f"{PLOVER}\n\n{BARE}")


def test_too_much_is_refused_and_nothing_left_out():
    most = "x" * (2048 - len("\n\n"))
    assert context(most) == f"{most}\n\n"
    for text in (f"{most}x", f"{BARE}\n\n{most}"):
        with pytest.raises(SettingsError, match="at most 2048"):
            context(text)


@pytest.mark.parametrize("text", ["\ud800", b"bytes", 7])
def test_what_is_no_text_is_refused_by_name(text):
    with pytest.raises(SettingsError, match="corpus_context"):
        context(text)


def test_the_default_is_titled_passages():
    passages = DEFAULT_CONTEXT.strip().split("\n\n")
    assert [len(passage.split("\n")) for passage in passages] == [2] * len(passages)
    rendered = "".join(f"{passage}\n\n" for passage in passages)
    # As many bytes are no tokens of a real model; of those it has fewer than a quarter.
    assert len(rendered) < 4 * 2048
    parts = [context(passage) for passage in passages]
    assert "".join(parts) == rendered
