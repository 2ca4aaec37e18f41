"""The numbers of docs/scale.md are what its formulas give, and those what the codecs make."""

from __future__ import annotations

import re
from math import ceil

import pytest
import torch

from kvrag.store.codecs import codec

from .pages import text_of

PAGE = "docs/scale.md"
CHUNKS, TOKENS, SHARDS = 100_000_000, 256, 100
#: Layers, KV heads, width of a head.
MODELS = {"SmolLM2-135M": (30, 3, 64), "Llama-3.1-8B": (32, 8, 128)}
CODECS = ("raw", "int8", "int4")


def segment(name: str, heads: int, dim: int, tokens: int = TOKENS) -> int:
    """Bytes of one layer, without padding, in a model of 16 bits (docs/codecs.md)."""
    numbers = heads * tokens * dim
    if name == "raw":
        return 2 * 2 * numbers
    groups, parts = max(1, tokens // 128), ceil(dim / 64)
    scales = heads * (groups * 2 * dim * 2 + tokens * parts * 2 + ceil(dim / 8))
    k = numbers if name == "int8" else numbers * 9 // 16
    v = numbers if name == "int8" else numbers // 2
    return scales + k + v


def block(model: str, name: str) -> int:
    """Bytes of a block."""
    layers, heads, dim = MODELS[model]
    return 4096 + layers * 4096 * ceil(segment(name, heads, dim) / 4096)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", text_of(PAGE), re.M | re.S)[1]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[2:]]


def number(cell: str) -> float:
    return float(re.match(r"[\d,.]+", cell)[0].replace(",", ""))


def same(cell: str, expected: float) -> bool:
    """Whether a cell is the number, rounded to its digits; three at least, where it has as many."""
    shown = cell.replace(",", "")
    digits = len(re.match(r"[\d.]+", shown)[0].replace(".", "").strip("0"))
    return abs(number(cell) - expected) <= expected * 0.5 * 10.0 ** (1 - max(digits, 2))


@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (8, 128)])
@pytest.mark.parametrize("name", CODECS)
def test_the_formula_of_a_segment_is_what_the_codec_makes(name, heads, dim):
    fine = [[list(range(dim // 8))] * heads] if name == "int4" else ()
    k, v = torch.randn(2, heads, TOKENS, dim, dtype=torch.bfloat16)
    assert len(codec(name, fine=fine).encode(k, v, layer=0)) == segment(name, heads, dim)


def test_bytes():
    table = rows("Bytes")
    assert [row[:2] for row in table] == [[model, name] for model in MODELS for name in CODECS]
    for model, name, a_block, one, two in table:
        nbytes = block(model, name)
        assert number(a_block) == nbytes
        assert same(one, CHUNKS * nbytes / 1e12), (model, name)
        assert same(two, 2 * CHUNKS * nbytes / 1e12), (model, name)


def test_shards():
    for what, a_unit, a_shard, of_all in rows("Shards"):
        each = block("SmolLM2-135M", "int4") * 2 if "KV" in what else number(a_unit)
        assert number(a_unit) == each, what
        assert same(a_shard, CHUNKS / SHARDS * each / 1e9), what
        assert same(of_all, CHUNKS * each / 1e12), what


def test_hours():
    for _, rate, one, two in rows("Hours"):
        hours = CHUNKS * TOKENS / number(rate) / 3600
        assert same(one, hours)
        assert same(two, 2 * hours)


def test_money():
    for model, name, one, price in rows("Money"):
        terabytes = CHUNKS * block(model, name) / 1e12
        assert same(one, terabytes)
        assert same(price, 20 * terabytes)


def test_loading():
    for model, name, rate, wanted in rows("When loading pays"):
        assert same(wanted, block(model, name) / TOKENS * number(rate) / 1e9), (model, name)
