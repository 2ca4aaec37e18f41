"""The first member of an exported corpus: what it is, and what it was made with."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from kvrag.errors import CorpusFileError, InputError

__all__ = ["FORMAT_VERSION", "Manifest", "Prefix"]

_FORMAT = "kvrag corpus"
FORMAT_VERSION = 1

_MOST_TEXT = 4 << 20
#: Settings of a namespace that belong to its corpus; the rest of the name is theirs.
_SETTING = re.compile(
    r"corpus_(instruction|context|embedder|chunk_tokens)"
    r"|layout [0-9a-f]{1,64} [0-9a-f]{1,64} [0-9a-f]{1,64}"
    r"|codec [a-z0-9]{1,16} [0-9a-zA-Z:_-]{1,128}",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What some of the blocks were computed behind, by its token ids."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is the same for all members.

    model, tokenizer, embedder: fingerprints. settings: those of the catalog that the corpus's maker
    fixed. prefixes: at most two; the number of a block is its place here.
    """

    name: str
    model: str
    dtype: str
    tokenizer: str
    embedder: str
    codec: str
    codec_version: int
    codec_digest: str
    prefixes: tuple[Prefix, ...]
    settings: dict[str, str]
    documents: int
    chunks: int

    def dumps(self) -> bytes:
        """The same bytes for the same manifest."""
        fields = {"format": _FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        return (json.dumps(fields, ensure_ascii=False, indent=1) + "\n").encode()

    @classmethod
    def loads(cls, data: bytes) -> Manifest:
        """Raises:
        InputError: it is of another version of the format.
        CorpusFileError: it is no manifest.
        """
        try:
            fields = json.loads(data)
            if not isinstance(fields, dict) or fields.pop("format", None) != _FORMAT:
                raise CorpusFileError("the manifest is not that of an exported corpus")
            version = fields.pop("version", None)
            if version != FORMAT_VERSION:
                raise InputError(
                    f"the file is an exported corpus of format version {version!r:.40}; this "
                    f"release reads version {FORMAT_VERSION}"
                )
            return _checked(fields)
        except (ValueError, RecursionError, TypeError, KeyError) as exc:
            if isinstance(exc, InputError):
                raise
            raise CorpusFileError(f"the manifest cannot be read: {exc!s:.200}") from exc


def _checked(fields: dict[str, Any]) -> Manifest:
    texts = ("name", "model", "dtype", "tokenizer", "embedder", "codec", "codec_digest")
    numbers = ("codec_version", "documents", "chunks")
    if set(fields) != {*texts, *numbers, "prefixes", "settings"}:
        raise ValueError(f"it has the fields {', '.join(map(str, sorted(fields)))}")
    for name in texts:
        _check_text(name, fields[name])
    for name in numbers:
        if type(fields[name]) is not int or not 0 <= fields[name] < 2**53:
            raise ValueError(f"{name} is no count")
    settings = fields["settings"]
    if not isinstance(settings, dict):
        raise ValueError("settings are no object")  # noqa: TRY004 - of what a file holds
    for name, value in settings.items():
        if _SETTING.fullmatch(name) is None:
            raise ValueError(f"it has a setting {name!r:.80}, which no corpus has")
        _check_text(name, value)
    prefixes = fields["prefixes"]
    if not isinstance(prefixes, list) or not 1 <= len(prefixes) <= 2:
        raise ValueError("it must have one or two prefixes")
    return Manifest(**fields | {"prefixes": tuple(map(_prefix, prefixes))})


def _prefix(value: Any) -> Prefix:
    token_ids = value["token_ids"]
    if list(value) != ["token_ids"] or not isinstance(token_ids, list):
        raise ValueError("a prefix has token ids and nothing else")
    if not all(type(one) is int and 0 <= one < 2**32 for one in token_ids):
        raise ValueError("a prefix has token ids from 0 to 2**32 - 1")
    return Prefix(tuple(token_ids))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > _MOST_TEXT:
        raise ValueError(f"{name} is no text of at most {_MOST_TEXT} characters")
    value.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
