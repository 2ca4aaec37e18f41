"""Byte-level BPE from a GGUF file's tokens and merges; `pre` names how text is split first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.models.gguf.metadata import Metadata

__all__ = ["byte_level_tokenizer"]

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
#: Words that end in lower case, or that are all upper case: "iPhone" is "i" and "Phone".
_LOWER_END = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_START = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"


def _cased(ending: str, digits: str) -> str:
    words = "|".join(
        rf"[^\r\n\p{{L}}\p{{N}}]?{word}{ending}" for word in (_LOWER_END, _UPPER_START)
    )
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


@dataclass(frozen=True, slots=True)
class _Split:
    """One way of splitting text into words.

    Args:
        pattern: a regular expression of the words; None: GPT-2's words with each digit alone.
        whole_words: a word that is a token is taken whole, even where merges do not lead to it.
        composed: text is normalised to NFC first.
    """

    pattern: str | None
    whole_words: bool = False
    composed: bool = False


_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"
_GPT2 = _Split(None)
_CL100K = f"{_LETTERS}|{_DIGITS}|{_REST}"
#: By `tokenizer.ggml.pre`.
_SPLITS: Mapping[str, _Split] = {
    "smollm": _GPT2,
    # Granite's and StarCoder's.
    "refact": _GPT2,
    "starcoder": _GPT2,
    "qwen2": _Split(f"{_LETTERS}|{_DIGIT}|{_REST}", composed=True),
    "llama-bpe": _Split(_CL100K, whole_words=True),
    # Llama 3's tokenizer without BOS, such as SmolLM3's.
    "smaug-bpe": _Split(_CL100K, whole_words=True),
    # OLMo 2's and Phi-4's.
    "dbrx": _Split(_CL100K),
    # Phi-4-mini's.
    "gpt-4o": _Split(_cased(f"{_ENDINGS}?", _DIGITS)),
    # Mistral's since Nemo.
    "tekken": _Split(_cased("", _DIGIT), whole_words=True),
}


def byte_level_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer without its added tokens.

    Raises:
        UnsupportedModelError: an unknown pre-tokenizer.
        ModelError: tokens or merges are missing or malformed.
    """
    pre = metadata.fields.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise UnsupportedModelError(
            f"{metadata.file}: tokenizer 'gpt2' with pre-tokenizer {pre!r} is not supported "
            f"({', '.join(_SPLITS)} are); use the model's Hugging Face folder"
        )
    split = _SPLITS[pre]
    vocab = {token: index for index, token in enumerate(metadata.token_list("tokens", str))}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.token_list("merges", str)]
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words)
    except Exception as exc:  # the library raises bare Exception: a merge of an unknown token
        raise ModelError(f"{metadata.file}: tokenizer.ggml.merges do not fit: {exc}") from exc
    tokenizer = Tokenizer(bpe)
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    if split.pattern is None:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    else:
        parts = [
            pre_tokenizers.Split(Regex(split.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
