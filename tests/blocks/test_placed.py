"""Whose block a prompt wants: the rule against a model of it."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import example, given
from hypothesis import strategies as st

from kvrag.blocks import PlacedBlocks

CHUNKS = range(4)


class Blocks:
    """Keys that can be read; `fitting` chunks fit behind the prefix."""

    codec = SimpleNamespace(name="raw")

    def __init__(self, name: str, fitting: frozenset[int]) -> None:
        self.name, self.fitting = name, fitting
        self.prefix_ids = (1,) if name == "first" else (1, 2)

    def __repr__(self) -> str:
        return self.name

    def key(self, token_ids):
        return (self.name, *token_ids)

    def fits(self, token_ids):
        return token_ids[0] in self.fitting


def placed_over(stored, *, fitting=frozenset(CHUNKS)):
    """Blocks for two places, where some tier has the keys in `stored`."""

    def locate(keys):
        return ["ram" if key in stored else None for key in keys]

    first, later = Blocks("first", frozenset(CHUNKS)), Blocks("later", fitting)
    return PlacedBlocks(first, later, locate)


def rule(place: int, chunk: int, chunks: list[int], stored, fitting) -> str:
    behind = "later" if chunk in fitting else "first"
    wanted, other = ("first", behind) if place == 0 else (behind, "first")
    if len(chunks) == 1:
        return "first"
    if (wanted, chunk) not in stored and (other, chunk) in stored:
        return other
    return wanted


@given(
    chunks=st.lists(st.sampled_from(CHUNKS), max_size=6),
    stored=st.sets(st.tuples(st.sampled_from(["first", "later"]), st.sampled_from(CHUNKS))),
    fitting=st.frozensets(st.sampled_from(CHUNKS)),
)
@example(chunks=[0], stored={("later", 0)}, fitting=frozenset(CHUNKS))
@example(chunks=[0, 0], stored={("first", 0)}, fitting=frozenset(CHUNKS))
@example(chunks=[0, 1], stored={("later", 1)}, fitting=frozenset())
def test_the_wanted_block_or_the_other_rather_than_none(chunks, stored, fitting):
    chosen = placed_over(stored, fitting=fitting).choose([(chunk,) for chunk in chunks])
    expected = [rule(place, c, chunks, stored, fitting) for place, c in enumerate(chunks)]
    assert [blocks.name for blocks in chosen] == expected


@given(chunks=st.lists(st.sampled_from(CHUNKS), max_size=6), stored=st.booleans())
def test_one_kind_is_chosen_without_asking_a_tier(chunks, stored):
    def locate(keys):
        raise AssertionError(f"asked for {keys}")

    only = Blocks("first", frozenset(CHUNKS) if stored else frozenset())
    placed = PlacedBlocks(only, only, locate)
    assert placed.choose([(chunk,) for chunk in chunks]) == [only] * len(chunks)
    assert placed.kinds((0,)) == placed.kinds((0,), first=False) == [only]


def test_what_is_made_of_a_chunk():
    placed = placed_over(set(), fitting=frozenset([0]))
    assert [blocks.name for blocks in placed.kinds((0,))] == ["later", "first"]
    assert [blocks.name for blocks in placed.kinds((0,), first=False)] == ["later"]
    # One that does not fit behind the context is stored as a first one, whatever was asked.
    for first in (True, False):
        assert [blocks.name for blocks in placed.kinds((1,), first=first)] == ["first"]
    assert placed.prefixes == ((1,), (1, 2))
