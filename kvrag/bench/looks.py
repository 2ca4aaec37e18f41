"""How each strategy and engine looks: the same colour and marker in every picture."""

from __future__ import annotations

import zlib
from typing import NamedTuple

__all__ = ["Look", "line_of", "look_of"]


class Look(NamedTuple):
    """Colour, marker and line style, in matplotlib's words."""

    colour: str
    marker: str
    line: str


#: Okabe and Ito's colours without yellow, which is too pale for lines, and one of Tol's: people who
#: are colour-blind tell them apart. Who shares one is seldom in a picture with the other.
_BLACK, _GREY, _WINE = "#000000", "#999999", "#882255"
_BLUE, _SKY, _GREEN = "#0072B2", "#56B4E9", "#009E73"
_RED, _ORANGE, _PINK = "#D55E00", "#E69F00", "#CC79A7"

_LOOKS = {
    "full": (_BLACK, "o"),
    "fast": (_BLUE, "o"),
    "true": (_RED, "s"),
    "cacheblend": (_GREEN, "^"),
    "query_attention": (_PINK, "D"),
    "reuse": (_ORANGE, "X"),
    "dhd": (_SKY, "P"),
    "epic": (_BLACK, "v"),
    "random": (_GREY, "*"),
    "nearest": (_GREY, "<"),
    "transformers": (_GREY, "p"),
    "vllm": (_WINE, "d"),
    "llama.cpp": (_SKY, "h"),
    "kvboost": (_PINK, "8"),
}
#: Of a name with options (`fast:most_rows=0`, `vllm:bfloat16`), and of names that are not ours.
_SPARE_COLOURS = (_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY, _WINE, _BLACK)
_SPARE_MARKERS = (">", "H", "p", "d", "8", "h")


def line_of(strategy: str) -> str:
    """A strategy without its ratio: what its points at several ratios have in common."""
    name, _, given = strategy.partition(":")
    options = [part for part in given.split(",") if part and not part.startswith("ratio=")]
    return ":".join([name, *filter(None, [",".join(options)])])


def look_of(name: str) -> Look:
    """The look of a strategy (a ratio does not matter) or an engine."""
    line = line_of(name)
    kind = line.partition(":")[0]
    drawn = zlib.crc32(line.encode())
    spare = (
        _SPARE_COLOURS[drawn % len(_SPARE_COLOURS)],
        _SPARE_MARKERS[drawn // len(_SPARE_COLOURS) % len(_SPARE_MARKERS)],
    )
    colour, marker = _LOOKS.get(kind, spare)
    return Look(colour, marker, "-") if line == kind else Look(colour, spare[1], ":")
