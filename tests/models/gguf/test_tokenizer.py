"""Tokenizers rebuilt from GGUF's lists give the ids of the libraries that the lists come from."""

from __future__ import annotations

import io
import json
import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.models.gguf.convert import convert_gguf
from kvrag.models.gguf.metadata import Metadata
from kvrag.models.gguf.tokenizer import gguf_tokenizer, tokenizer_options
from kvrag.models.tokenizer import Tokenizer
from tests.models.gguf.files import byte_level_keys, tiny_gguf
from tests.models.tiny_models import SPECIAL, TEXT

# ---- byte-level BPE ------------------------------------------------------------------------------

#: As the families' tokenizer.json have them.
REGEX = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
REGEX["smaug-bpe"] = REGEX["dbrx"] = REGEX["llama-bpe"]
WHOLE_WORDS = ("llama-bpe", "smaug-bpe", "tekken")


def family_tokenizer(folder: Path, pre: str) -> FastTokenizer:
    """The folder's tokenizer as a family with the pre-tokenizer `pre` has it."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = pre in WHOLE_WORDS
    tokenizer = FastTokenizer.from_str(json.dumps(content))
    if pre in REGEX:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(REGEX[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.fixture(scope="module", params=["smollm", "refact", "starcoder", *REGEX])
def tokenizers(request, tiny, tmp_path_factory):
    """The tokenizer rebuilt from GGUF, and the family's own."""
    root = tmp_path_factory.mktemp("gguf")
    folder = tiny(intermediate_size=64)
    tiny_gguf(tiny, root / "tiny.gguf", tokenizer=byte_level_keys(folder, request.param))
    rebuilt = Tokenizer(convert_gguf(root / "tiny.gguf", root / "converted"))
    return rebuilt, family_tokenizer(folder, request.param)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(
        st.one_of(
            st.characters(exclude_categories=["Cs"]),
            st.sampled_from("aA1 2'sS'LLre\r\n\t  .,é́Ångström東京😀①Ⅷ/"),
        ),
        max_size=40,
    )
)
@example(text=TEXT)
@example(text="I'LL we'Re 1234567 \uff11\uff12\uff13 x²  y\n\n\n z \r\n end   ")
@example(text="iPhone McDonald's HTTPServer's a/b//\n/ ÀÉ́x")
@example(text=" ".join(SPECIAL))
def test_tokenizer_equals_the_familys_own(tokenizers, text):
    rebuilt, own = tokenizers
    assert rebuilt.encode_template(text) == own.encode(text, add_special_tokens=False).ids
    if not any(special in text for special in SPECIAL):
        ids = own.encode(text, add_special_tokens=False).ids
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == own.decode(ids)


def test_control_tokens_stay_text(tokenizers):
    rebuilt, _ = tokenizers
    for special in SPECIAL:
        assert not set(rebuilt.encode(f"a{special}b")) & {0, 1, 2}
        assert rebuilt.encode_template(special) == [SPECIAL.index(special)]


def test_user_defined_tokens(tiny, tmp_path):
    """Tokens of the kind "user defined" are whole wherever they stand, and are shown as text."""
    path = tmp_path / "tiny.gguf"
    folder = tiny(intermediate_size=64)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    token = max((text for text in vocab if text.isascii() and text.isalpha()), key=len)
    tiny_gguf(tiny, path, tokenizer=byte_level_keys(folder, token_types={vocab[token]: 4}))
    made = Tokenizer(convert_gguf(path, tmp_path / "converted"))
    assert len(token) > 2
    assert vocab[token] in made.encode(f"x{token}x")
    assert made.decode([vocab[token]]) == token


def test_control_token_that_is_called_user_defined(tiny):
    """Older files of Phi-3 do so, and a document could have ended the turn."""
    token_types = {SPECIAL.index(special): 4 for special in SPECIAL}
    keys = byte_level_keys(tiny(intermediate_size=64), token_types=token_types)
    tokenizer = gguf_tokenizer(Metadata("x.gguf", {"general.architecture": "phi3"} | keys))
    tokenizer.encode_special_tokens = True
    assert not {0, 1, 2} & set(tokenizer.encode("".join(SPECIAL)).ids)
    tokenizer.encode_special_tokens = False
    assert tokenizer.encode("".join(SPECIAL)).ids == [0, 1, 2]


def test_chat_template_and_tokens(tiny, tmp_path):
    path = tmp_path / "tiny.gguf"
    folder, _ = tiny_gguf(tiny, path, extra={"tokenizer.ggml.bos_token_id": 1})
    made = Tokenizer(convert_gguf(path, tmp_path / "converted"))
    messages = [{"role": "user", "content": "Who?"}]
    assert made.render_chat(messages) == Tokenizer(folder).render_chat(messages)
    path = tmp_path / "none.gguf"
    tiny_gguf(tiny, path, drop=("tokenizer.chat_template",))
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer(convert_gguf(path, tmp_path / "converted")).render_chat(messages)


def keys_of(tiny, **changes):
    """Metadata with a byte-level tokenizer."""
    return (
        {"general.architecture": "llama"}
        | byte_level_keys(tiny(intermediate_size=64))
        | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    )


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_eos_token": True}, [], [2]),
        # llama.cpp adds it for these without being told.
        ({"pre": "llama-bpe"}, [1], []),
        ({"pre": "tekken"}, [1], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_ends_of_a_text(tiny, tmp_path, changes, before, after):
    """The library adds them when it is asked to; our own encoding never does."""
    metadata = Metadata("x.gguf", keys_of(tiny, bos_token_id=1, **changes))
    tokenizer = gguf_tokenizer(metadata)
    plain = tokenizer.encode("lamp", add_special_tokens=False).ids
    assert tokenizer.encode("lamp").ids == before + plain + after
    assert tokenizer.encode("lamp", "lamp").ids == (before + plain + after) * 2
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = tokenizer_options(metadata)
    assert (options["add_bos_token"], options["add_eos_token"]) == (bool(before), bool(after))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path).encode("lamp") == before + plain + after
    assert Tokenizer(tmp_path).encode("lamp") == plain


@pytest.mark.parametrize(
    ("names", "eot", "ends"),
    [
        ([], None, {2}),
        ([], 1, {1, 2}),
        (["<end_of_turn>", "<|eot_id|>"], None, {2, 50, 51}),
    ],
)
def test_ends_of_a_turn(tiny, tmp_path, names, eot, ends):
    """Files of chat models often name the end of the text alone, and answers would run on."""
    keys = byte_level_keys(tiny(intermediate_size=64))
    for index, name in enumerate(names, start=50):
        keys["tokenizer.ggml.merges"] = [
            merge
            for merge in keys["tokenizer.ggml.merges"]
            if keys["tokenizer.ggml.tokens"][index]
            not in (*merge.split(" "), merge.replace(" ", ""))
        ]
        keys["tokenizer.ggml.tokens"][index] = name
        keys["tokenizer.ggml.token_type"][index] = 3
    keys["tokenizer.ggml.eot_token_id"] = eot
    tiny_gguf(tiny, tmp_path / "tiny.gguf", tokenizer=keys)
    folder = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    found = json.loads((folder / "config.json").read_text())["eos_token_id"]
    assert set(found if isinstance(found, list) else [found]) == ends


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        (
            {"pre": "deepseek-llm"},
            UnsupportedModelError,
            "'gpt2' with pre-tokenizer 'deepseek-llm'",
        ),
        ({"pre": None}, UnsupportedModelError, "'gpt2' with pre-tokenizer None"),
        ({"model": "bert"}, UnsupportedModelError, "tokenizer 'bert' with pre-tokenizer 'smollm'"),
        ({"model": "t5"}, UnsupportedModelError, "tokenizer 't5'"),
        ({"token_type": [1, 1]}, ModelError, "token_type has 2 entries for 400 tokens"),
        ({"token_type": [9] * 400}, ModelError, "token_type: 9 is not a valid TokenType"),
        ({"tokens": "abc"}, ModelError, "tokenizer.ggml.tokens is no list of str"),
        ({"merges": ["no such"]}, ModelError, "tokenizer.ggml.merges do not fit"),
        ({"merges": ["whole"]}, ModelError, "tokenizer.ggml.merges do not fit"),
        ({"bos_token_id": 400, "add_bos_token": True}, ModelError, "bos_token_id is 400"),
    ],
)
def test_tokenizer_is_refused(tiny, changes, error, part):
    with pytest.raises(error) as caught:
        gguf_tokenizer(Metadata("x.gguf", keys_of(tiny, **changes)))
    assert str(caught.value).startswith("x.gguf")
    assert part in str(caught.value)


# ---- SentencePiece -------------------------------------------------------------------------------

PIECES = [
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\x00", "\x7f", "\ufeff", "\u200b", "▁", "▁▁"),
    *(
        "1",
        "23",
        "4567",
        "3.14",
        "😀",
        "👨‍👩‍👧",
        "東京",
        "Москва",
        "é",
        "é",
        "ﷺ",
        "\U0001d539",
        "ꙮ",
        "𐎀",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<0xFF>",
        "\ufffd",
        "\x80",
        "[user]",
        "<tab>",
        "</b>",
        "> </",
    ),
    *("aaaa", "aaaaaaa", "====", "ababab", "=", "a", "The", "the", "ing", "def f(x):", "naïve"),
]


def random_texts(count, seed=0):
    """Spaces in runs, digits, rare scripts, what looks like tokens, and repetitions."""
    rng = random.Random(seed)
    for number in range(count):
        kind = number % 5
        if kind == 0:
            yield "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))
        elif kind == 1:
            yield "".join(rng.choice("abcdeinorst ABC  \n.,1") for _ in range(rng.randint(1, 60)))
        elif kind == 2:
            yield "".join(rng.choice(["ab ", "a=", "ab"][number % 3]) for _ in range(40))
        elif kind == 3:
            start = rng.randrange(len(TEXT))
            yield TEXT[start : start + rng.randint(1, 200)]
        else:
            tops = (0x3000, 0xD800, 0x110000)
            codes = (rng.randrange(1, rng.choice(tops)) for _ in range(rng.randint(1, 20)))
            yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def real_texts():
    """Prose and programs, of which some are long."""
    yield TEXT
    library = Path(os.__file__).parent
    for name in ("this.py", "argparse.py", "json/decoder.py", "html/entities.py"):
        yield (library / name).read_text(encoding="utf-8")[:100_000]


def keys_of_pieces(pieces, *, prefix):
    """A GGUF file's tokenizer from SentencePiece's; the converter unescapes user-defined spaces."""
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            p.piece.replace("▁", " ") if p.type == p.USER_DEFINED else p.piece for p in pieces
        ],
        "tokenizer.ggml.scores": [float(p.score) for p in pieces],
        "tokenizer.ggml.token_type": [int(p.type) for p in pieces],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


VARIANTS = {
    # As Llama 2 and Mistral have it, and Gemma.
    "llama": {"add_dummy_prefix": True},
    "no-prefix": {"add_dummy_prefix": False},
    "unknown": {"add_dummy_prefix": True, "byte_fallback": False},
    "user-defined": {
        "add_dummy_prefix": True,
        "user_defined_symbols": ["[user]", "<tab>", "▁▁", "\n"],
    },
    "gemma": {
        "add_dummy_prefix": False,
        "user_defined_symbols": ["[user]", "▁▁", "▁▁▁", "\n", "\n\n", "<tab>"],
    },
    # Pieces with spaces inside.
    "phrases": {"add_dummy_prefix": True, "split_by_whitespace": False},
}


@pytest.fixture(scope="module", params=VARIANTS)
def sentencepieces(request):
    """The library's own processor of a vocabulary trained here, and the tokenizer of its lists."""
    library = pytest.importorskip("sentencepiece", reason="needs sentencepiece (the dev extra)")
    from sentencepiece import sentencepiece_model_pb2 as format_

    options = {"byte_fallback": True, **VARIANTS[request.param]}
    lines = [line for text in real_texts() for line in text.split("\n\n") if 0 < len(line) < 4000]
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *random_texts(300, seed=7)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=2000,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    processor = library.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    proto = format_.ModelProto()
    proto.ParseFromString(model.getvalue())
    keys = keys_of_pieces(proto.pieces, prefix=options["add_dummy_prefix"])
    tokenizer = gguf_tokenizer(Metadata("x.gguf", keys))
    tokenizer.encode_special_tokens = True
    return processor, tokenizer, options


def check_equal(processor, tokenizer, texts, *, alone=()):
    for text in texts:
        expected = processor.encode(text)
        if text in alone:
            # The one known difference: no space in front of a user-defined token alone.
            expected = expected[-1:]
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, repr(text)
        if processor.unk_id() not in expected and text not in alone:
            decoded = tokenizer.decode(expected, skip_special_tokens=False)
            assert decoded == processor.decode(expected), repr(text)


def test_equals_sentencepiece(sentencepieces):
    processor, tokenizer, options = sentencepieces
    alone = ()
    if options["add_dummy_prefix"]:
        alone = [s.replace("▁", " ") for s in options.get("user_defined_symbols", ())]
    check_equal(processor, tokenizer, random_texts(4000), alone=alone)
    check_equal(processor, tokenizer, real_texts())


def test_long_text_is_fast(sentencepieces):
    """Without a split every text is one word; 100 kB, of words and of one word."""
    processor, tokenizer, _ = sentencepieces
    rng = random.Random(3)
    letters = [rng.choice("abcdefghinorst") for _ in range(100_000)]
    for text in (
        "".join(letters),
        " ".join("".join(letters[i : i + 6]) for i in range(0, 90000, 6)),
    ):
        began = time.perf_counter()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert time.perf_counter() - began < 2
        assert ids == processor.encode(text)


def test_space_in_front_follows_a_control_token(sentencepieces):
    """As llama.cpp has it, and the models' tokenizer.json: "<s>Hi" is "<s>", "▁Hi"."""
    processor, tokenizer, _ = sentencepieces
    tokenizer.encode_special_tokens = False
    try:
        ids = tokenizer.encode("<s>The lamp", add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = True
    assert ids == [1, *processor.encode("The lamp")]
    assert tokenizer.encode("The lamp").ids == ids  # BOS is asked of SentencePiece's by default


LISTS = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "ab", "abb", "a", "b", "bb", "<0x41>"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0, 0.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.unknown_token_id": 0,
}


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"scores": [0.0, 0.0, 0.0, -1.0, -1.0] + [-3.0] * 4}, UnsupportedModelError, "'ab' and"),
        ({"precompiled_charsmap": [1, 2]}, UnsupportedModelError, "precompiled_charsmap"),
        ({"remove_extra_whitespaces": True}, UnsupportedModelError, "remove_extra_whitespaces"),
        ({"scores": [0.0]}, ModelError, "scores has 1 entries for 9 tokens"),
        ({"scores": None}, ModelError, "scores"),
        ({"token_type": [2, 3, 3, 1, 1, 1, 1, 1, 6]}, ModelError, "1 of the 256 byte tokens"),
        ({"unknown_token_id": 9}, ModelError, "unknown_token_id is 9"),
    ],
)
def test_sentencepiece_is_refused(changes, error, part):
    keys = LISTS | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(error) as caught:
        gguf_tokenizer(Metadata("x.gguf", keys))
    assert str(caught.value).startswith("x.gguf")
    assert part in str(caught.value)


def test_transformers_opens_the_folder(tiny, tmp_path):
    """A Gemma with its own kind of tokenizer: the same ids in transformers, with its BOS."""
    keys = LISTS | {
        "tokenizer.ggml.tokens": [*LISTS["tokenizer.ggml.tokens"], *(f"t{i}" for i in range(391))],
        "tokenizer.ggml.scores": LISTS["tokenizer.ggml.scores"] + [-10.0 - i for i in range(391)],
        "tokenizer.ggml.token_type": LISTS["tokenizer.ggml.token_type"] + [3] * 391,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    }
    keys.pop("general.architecture")
    tiny_gguf(tiny, tmp_path / "tiny.gguf", "gemma3", tokenizer=keys)
    folder = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode("abbab") == [1, 4, 3]
    assert Tokenizer(folder).encode("abbab") == [4, 3]
    assert theirs.decode([4, 3]) == "abbab"
