"""Every command and snippet of the pages runs, and answers in JSON have the shape that is shown.

A page is read from its top: a block finds the files, exports and servers of those above it. What
cannot be run here says so, in a comment above it that no reader sees.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from .pages import PAGES, Block, blocks

RUN = ("bash", "python")


def run_here(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in RUN and block.reason is None]


@pytest.mark.parametrize("page", [page for page in PAGES if run_here(page)])
def test_the_blocks_of_a_page_run_in_their_order(page, reader):
    printed, before = "", None
    printing = [block for block in run_here(page) if block.language == "bash"]
    for block in blocks(page):
        if block.language in RUN and block.reason is None:
            printed = reader.run(block)
        elif block.language == "json" and before in printing:
            check_shape(shown(block.text), json.loads(printed.splitlines()[-1]), str(block))
        before = block


def shown(text: str) -> Any:
    """A JSON value in which `…` stands for further elements, or for further fields."""
    text = re.sub(r",\s*…(?=\s*\])", "", text)
    return json.loads(re.sub(r",\s*…(?=\s*\})", ', "…": null', text))


def check_shape(expected: Any, got: Any, place: str) -> None:
    """The fields that are shown are those that come, of the same types. Null may be anything."""
    if expected is None or got is None:
        return
    number = isinstance(expected, int | float) and isinstance(got, int | float)
    assert number or type(expected) is type(got), (place, expected, got)
    if isinstance(expected, dict):
        names = expected.keys() - {"…"}
        assert names <= got.keys() if "…" in expected or not names else names == got.keys(), place
        for name in names:
            check_shape(expected[name], got[name], f"{place}: {name}")
    elif isinstance(expected, list) and expected and got:
        check_shape(expected[0], got[0], f"{place}[0]")
