"""The settings of an exported corpus, checked before an engine would open a corpus with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvrag.blocks import context_ids
from kvrag.errors import CorpusFileError, SettingsError
from kvrag.models.tokenizer import Tokenizer

__all__ = ["check_settings", "fine_of"]


def check_settings(settings: Mapping[str, str], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises CorpusFileError for values that no engine has written."""
    for name, value in settings.items():
        if name.startswith("layout "):
            _check_layout(value, vocab_size)
        elif name == "corpus_chunk_tokens" and not (value.isdecimal() and value.isascii()):
            raise CorpusFileError(f"the file has {name} {value!r:.40}, which is no number")
    if "corpus_instruction" not in settings:
        raise CorpusFileError("the file does not say what the corpus was made with")
    try:
        context_ids(settings.get("corpus_context", ""), tokenizer)
    except SettingsError as exc:
        raise CorpusFileError(f"the file has a corpus_context that cannot be: {exc}") from exc


def fine_of(text: str) -> list[list[list[int]]]:
    """The channels that a codec was calibrated to, as the setting has them. Raises as above."""
    layers = _parsed(text)
    try:
        return [[[_whole(one) for one in head] for head in layer] for layer in layers]
    except TypeError as exc:
        raise CorpusFileError("the file has a calibration that no codec takes") from exc


def _check_layout(text: str, vocab_size: int) -> None:
    layout = _parsed(text)
    sound = (
        isinstance(layout, list)
        and len(layout) == 2
        and all(isinstance(ids, list) for ids in layout)
        and all(type(one) is int and 0 <= one < vocab_size for ids in layout for one in ids)
    )
    if not sound:
        raise CorpusFileError("the file has a layout of prompts that no model takes")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise CorpusFileError(f"the file has a setting that is no JSON: {exc!s:.100}") from exc


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError("channels are whole numbers")
    return value
