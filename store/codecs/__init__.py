"""Codecs by name. The one part of the store that imports torch."""

from __future__ import annotations

from ..errors import UnknownCodecError
from .base import Codec
from .raw import RawCodec

__all__ = ["Codec", "RawCodec", "codec", "codec_names"]

_CODECS: tuple[type[RawCodec], ...] = (RawCodec,)


def codec_names() -> tuple[str, ...]:
    """The names of all codecs."""
    return tuple(made.name for made in _CODECS)


def codec(name: str) -> Codec:
    """The codec of that name. Raises `UnknownCodecError`, which names the known ones."""
    for made in _CODECS:
        if made.name == name:
            return made()
    raise UnknownCodecError(f"there is no codec {name!r}; known: {', '.join(codec_names())}")
