"""The tokenizer of a GGUF file, as tokenizer.json and tokenizer_config.json have it."""

from __future__ import annotations

from typing import Any

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, processors

from kvrag.errors import UnsupportedModelError
from kvrag.models.gguf.bpe import byte_level_tokenizer
from kvrag.models.gguf.metadata import Metadata
from kvrag.models.gguf.sentencepiece import sentencepiece_tokenizer

__all__ = ["gguf_tokenizer", "tokenizer_options"]

_KINDS = {"gpt2": byte_level_tokenizer, "llama": sentencepiece_tokenizer}


def gguf_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer with its control and user-defined tokens, and BOS and EOS where they are asked.

    Raises:
        UnsupportedModelError: a kind, pre-tokenizer or normalisation that is not supported.
        ModelError: a list is missing or malformed.
    """
    model = metadata.tokenizer("model")
    if model not in _KINDS:
        raise UnsupportedModelError(
            f"{metadata.file}: tokenizer {model!r} with pre-tokenizer "
            f"{metadata.fields.get('tokenizer.ggml.pre')!r} is not supported ({', '.join(_KINDS)} "
            "are); use the model's Hugging Face folder"
        )
    tokenizer = _KINDS[model](metadata)
    kinds = list(zip(metadata.token_list("tokens", str), metadata.token_types(), strict=True))
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in kinds
            if kind is TokenType.CONTROL
        ]
    )
    # SentencePiece finds its own in normalised text, where a space is another character.
    normalized = model == "llama"
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=normalized)
            for token, kind in kinds
            if kind is TokenType.USER_DEFINED
        ]
    )
    ends = {name: index for name in ("bos", "eos") if (index := _added(metadata, name)) is not None}
    if ends:
        before, after = ([f"<{n}>"] if n in ends else [] for n in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(f"<{name}>", index) for name, index in ends.items()],
        )
    return tokenizer


def tokenizer_options(metadata: Metadata) -> dict[str, Any]:
    """The tokenizer_config.json beside it."""
    tokens = metadata.token_list("tokens", str)
    options: dict[str, Any] = {
        "chat_template": metadata.fields.get("tokenizer.chat_template"),
        # What transformers needs to open the folder too.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _added(metadata, "bos") is not None,
        "add_eos_token": _added(metadata, "eos") is not None,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.token_id(theirs)
        options[f"{ours}_token"] = None if index is None else tokens[index]
    return options


def _added(metadata: Metadata, name: str) -> int | None:
    """The id that is put around a text: as the file says, else as llama.cpp does."""
    asked = metadata.fields.get(f"tokenizer.ggml.add_{name}_token")
    if asked is None:
        pre = metadata.fields.get("tokenizer.ggml.pre")
        asked = name == "bos" and (
            metadata.tokenizer("model") == "llama" or pre in ("llama-bpe", "tekken")
        )
    return metadata.token_id(name) if asked else None
