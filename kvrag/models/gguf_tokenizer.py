"""The tokenizer of a GGUF file: lists of tokens and merges back into a byte-level BPE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kvrag.errors import ModelError, UnsupportedModelError

__all__ = ["gguf_tokenizer", "tokenizer_field", "tokenizer_options"]

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def gguf_tokenizer(path: Path, fields: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE from GGUF's lists; how text is split first is named by `pre`."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(numbers: str) -> pre_tokenizers.PreTokenizer:
        pattern = Regex(f"{_LETTERS}|{numbers}|{_REST}")
        return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])

    known: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        ),
        "qwen2": lambda: split(r"\p{N}"),
        "llama-bpe": lambda: split(r"\p{N}{1,3}"),
    }
    if kind != "gpt2" or pre not in known:
        raise UnsupportedModelError(
            f"{path.name}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported "
            f"(gpt2 with {', '.join(known)} is); use the model's Hugging Face folder"
        )
    tokens: list[str] = tokenizer_field(path, fields, "tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in tokenizer_field(path, fields, "merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = known[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    control, user_defined = 3, 4  # gguf's TokenType
    types = tokenizer_field(path, fields, "token_type")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True)
         if k == control]
    )  # fmt: skip
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True)
         if k == user_defined]
    )  # fmt: skip
    return tokenizer


def tokenizer_options(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    options: dict[str, Any] = {"chat_template": fields.get("tokenizer.chat_template")}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        options[f"{ours}_token"] = None if index is None else tokens[index]
    # What transformers needs to open the folder too.
    options["tokenizer_class"] = "PreTrainedTokenizerFast"
    return options


def tokenizer_field(path: Path, fields: dict[str, Any], name: str) -> Any:
    try:
        return fields[f"tokenizer.ggml.{name}"]
    except KeyError as exc:
        raise ModelError(f"{path.name} lacks the key tokenizer.ggml.{name}") from exc
