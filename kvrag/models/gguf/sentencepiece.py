"""SentencePiece's BPE from a GGUF file's tokens and scores, in the `tokenizers` library.

SentencePiece joins the two neighbours whose joined piece has the highest score, and of equals the
leftmost. The library wants a ranked list of pairs instead, which is derived here: all ways to cut a
piece in two, by the piece's score. User-defined tokens are found in normalised text before anything
is joined, the longest first.

Ids are those of `sentencepiece`, compared on 8.7 MB of real text and 20,000 random strings with the
vocabulary of Gemma 3, and on 20,000 random strings each with six vocabularies trained for it (with
and without a space in front, byte tokens and user-defined ones), but for one case: where a space is
put in front, a text that *is* a user-defined token, and nothing else, gets none.

Where two pieces have one score, an order of pairs cannot say "leftmost": with made-up vocabularies
one text in seven came out differently. Such a file is refused; training never makes one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from gguf.constants import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.models.gguf.metadata import Metadata

__all__ = ["sentencepiece_tokenizer"]

_SPACE = "▁"


def sentencepiece_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer without its added tokens.

    Raises:
        UnsupportedModelError: a normalisation that is not supported.
        ModelError: tokens or scores are missing or malformed.
    """
    charsmap = metadata.fields.get("tokenizer.ggml.precompiled_charsmap")
    if any(charsmap) if isinstance(charsmap, list) else charsmap is not None:
        raise UnsupportedModelError(
            f"{metadata.file}: tokenizer.ggml.precompiled_charsmap is not supported; "
            "use the model's Hugging Face folder"
        )
    if metadata.fields.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise UnsupportedModelError(
            f"{metadata.file}: tokenizer.ggml.remove_extra_whitespaces is not supported; "
            "use the model's Hugging Face folder"
        )
    tokens = metadata.token_list("tokens", str)
    types = metadata.token_types()
    scores = metadata.token_list("scores", float, length=len(tokens))
    normal = {
        token: score
        for token, score, kind in zip(tokens, scores, types, strict=True)
        if kind is TokenType.NORMAL
    }
    num_bytes = sum(kind is TokenType.BYTE for kind in types)
    if num_bytes not in (0, 256):
        raise ModelError(f"{metadata.file}: its tokenizer has {num_bytes} of the 256 byte tokens")
    unknown = metadata.token_id("unknown")
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges(metadata.file, normal),
        unk_token=None if unknown is None else tokens[unknown],
        byte_fallback=num_bytes == 256,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(bpe)
    user_defined = [
        token for token, kind in zip(tokens, types, strict=True) if kind is TokenType.USER_DEFINED
    ]
    prefixed = metadata.fields.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = _normalizer(user_defined, prefixed=prefixed)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_word(normal)), "isolated")
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


#: Characters of a piece; trained vocabularies have a few dozen.
_LONGEST_PIECE = 1000


def _merges(file: str, normal: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs that make a piece, best piece first; `normal` is the score by piece."""
    longest = max(normal, key=len, default="")
    if len(longest) > _LONGEST_PIECE:
        raise UnsupportedModelError(
            f"{file}: its tokenizer has a token of {len(longest)} characters ({longest[:20]!r} …), "
            f"and {_LONGEST_PIECE} are supported"
        )
    ranked = sorted(normal, key=normal.__getitem__, reverse=True)
    merges = {
        piece: [
            (piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in normal and piece[cut:] in normal
        ]
        for piece in ranked
    }
    joined = [piece for piece in ranked if merges[piece]]
    for piece, other in pairwise(joined):
        if normal[piece] == normal[other]:
            raise UnsupportedModelError(
                f"{file}: the tokens {piece!r} and {other!r} have the same score, so that their "
                "order is not that of a BPE; use the model's Hugging Face folder"
            )
    return [pair for piece in joined for pair in merges[piece]]


def _normalizer(user_defined: Iterable[str], *, prefixed: bool) -> normalizers.Normalizer:
    spaces = normalizers.Replace(" ", _SPACE)
    if not prefixed:
        return spaces
    # The library normalises user-defined tokens too, to find them in normalised text: alone they
    # must not get the space that a text gets in front.
    alone = "|".join(["", *map(_literal, user_defined)])
    front = normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)"), _SPACE)
    return normalizers.Sequence([front, spaces])


def _word(normal: Iterable[str]) -> str:
    """A pattern of stretches of text that no piece reaches across.

    Nearly all pieces have a space at their beginning alone, so text is cut before spaces, save
    after the few characters that some piece has before a space. Otherwise a page is one word, and
    one that is met once: no cache of words helps.
    """
    before = {_SPACE}
    for piece in normal:
        before.update(piece[at - 1] for at in range(1, len(piece)) if piece[at] == _SPACE)
    inside = "".join(map(_literal, sorted(before)))
    return rf"[\s\S](?:[^{_SPACE}]|(?<=[{inside}]){_SPACE})*"


def _literal(text: str) -> str:
    """`text` in a regular expression."""
    return "".join(rf"\x{{{ord(char):X}}}" for char in text)
