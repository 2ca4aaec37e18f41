"""Codecs by name. The one part of the store that imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnknownCodecError
from .base import Codec, Layout, Unpack
from .grouped import GroupedCodec
from .raw import RawCodec

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Codec",
    "GroupedCodec",
    "Layout",
    "RawCodec",
    "Unpack",
    "codec",
    "codec_names",
]


def codec_names() -> tuple[str, ...]:
    """The names of all codecs."""
    return ("raw", "int8", "int4")


def codec(
    name: str,
    *,
    fine: Sequence[Sequence[Sequence[int]]] = (),
    unpack: Unpack | None = None,
) -> Codec:
    """The codec of that name. `fine` is for int4 alone; see `GroupedCodec`.

    Raises:
        UnknownCodecError: there is none of that name; the message names the known ones.
    """
    if name not in codec_names():
        raise UnknownCodecError(f"there is no codec {name!r}; known: {', '.join(codec_names())}")
    if name == "int4":
        return GroupedCodec(4, fine=fine, unpack=unpack)
    if fine:
        raise UnknownCodecError(f"{name} takes no fine channels; int4 does")
    return RawCodec() if name == "raw" else GroupedCodec(8, unpack=unpack)
