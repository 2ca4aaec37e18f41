"""Token ids, chat templates and streaming text, against transformers and the whole text."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrag.errors import ModelError
from kvrag.models.tokenizer import Tokenizer
from tests.models.tiny_models import CHATML, SPECIAL, TEXT, make_tokenizer

MESSAGES = [
    {"role": "system", "content": "Answer <b>briefly</b>."},
    {"role": "user", "content": "  Who keeps “the lamp”?\n"},
]
#: Beyond what Hypothesis draws by itself: what tokenizers cut, join or normalise.
CHARACTERS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("🚢😀👩‍👩‍👧🏽é́ß東京\u200d\ufeff\u2028\x00\r\n\t  '\"<|>_"),
    ),
    max_size=40,
)

TEMPLATES = {
    "chatml": CHATML,
    "spaces": "{%- for m in messages -%}\n  [{{ m.role|upper }}] {{ m['content'] | trim }}\n"
    "{%- endfor %}\n{% if add_generation_prompt %}[ANSWER]{% endif %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "json options": "{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}"
    "{{ messages | tojson(separators=(',', ':')) }}",
    # Tokens that the model does not have are undefined, not empty.
    "tokens undefined": "{{ unk_token is defined }}{{ sep_token is defined }}"
    "{{ cls_token | default('none') }}{{ bos_token is defined }}",
    "tokens": "{{ bos_token }}{{ eos_token }}|{{ unk_token }}|{{ pad_token }}"
    "{{ messages[1].content }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% break %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}:{{ m.content }}{% endfor %}",
    "date": "{{ strftime_now('%Y-%m-%d') }}{{ messages[1].content }}",
    "tools unset": "{% if not tools is defined %}{% set tools = none %}{% endif %}"
    "{% if tools is not none %}TOOLS{% endif %}{{ messages[1].content }}",
    # transformers passes `tools` and `documents` as None; undefined would be "not none".
    "tools none": "{% if tools is not none %}TOOLS{% endif %}"
    "{% if documents is not none %}DOCUMENTS{% endif %}{{ messages[1].content }}",
    # The tag by which training masks the assistant's part, part of several published templates.
    "generation tag": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path, bos_token=SPECIAL[1])
    return path


@pytest.fixture(scope="session")
def tokenizer(folder):
    return Tokenizer(folder)


@pytest.fixture(scope="session")
def theirs(folder):
    return transformers_tokenizer(folder)


def transformers_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


# ---- ids -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=CHARACTERS)
@example(text=TEXT)
@example(text="")
def test_ids_and_text_equal_transformers(tokenizer, theirs, text):
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("special", SPECIAL)
def test_control_tokens_written_as_text_stay_text(tokenizer, special):
    """A document must not end its own turn."""
    ids = tokenizer.encode(f"before{special}after {special}")
    assert not set(ids) & set(range(len(SPECIAL)))
    assert tokenizer.decode(ids) == f"before{special}after {special}"
    assert SPECIAL.index(special) in tokenizer.encode_template(f"before{special}after")


def test_decode_leaves_control_tokens_out(tokenizer):
    ids = [1, *tokenizer.encode("lamp"), 2]
    assert tokenizer.decode(ids) == "lamp"


@pytest.mark.parametrize("what", ["truncation", "padding"])
def test_truncation_and_padding_of_the_file_are_not_used(folder, tmp_path, what):
    """Fine-tuned models are published with a tokenizer.json that truncates or pads as in training.

    transformers switches both off unless asked; a passage must not be cut or filled silently.
    """
    path = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((path / "tokenizer.json").read_text())
    content["truncation"], content["padding"] = None, None
    content[what] = {
        "truncation": {
            "direction": "Right",
            "max_length": 16,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 400},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": SPECIAL[0],
        },
    }[what]
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert transformers_tokenizer(path).encode(TEXT, add_special_tokens=False) == Tokenizer(
        folder
    ).encode(TEXT)
    made = Tokenizer(path)
    assert made.encode(TEXT) == Tokenizer(folder).encode(TEXT)
    assert made.encode_template(TEXT) == Tokenizer(folder).encode_template(TEXT)


# ---- files and vocabularies ----------------------------------------------------------------------


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17209920\n"
    )
    with pytest.raises(ModelError, match=r"tokenizer\.json is a Git LFS pointer.*git lfs pull"):
        Tokenizer(tmp_path)


def test_tokens_beyond_the_embedding(tokenizer):
    vocab = tokenizer.vocab_size
    assert tokenizer.token_beyond(vocab) is None
    assert tokenizer.token_beyond(vocab + 64) is None  # an embedding that is padded
    assert tokenizer.token_beyond(vocab - 3) == (vocab - 3, tokenizer.token(vocab - 3))


@pytest.mark.parametrize(
    ("special", "template", "found"),
    [
        (True, None, False),
        (True, "{{ messages[0].content }}", False),
        # Gemma 3 of text alone has the image token of its family, and no row for it.
        (True, "{{ messages[0].content }}<image>", True),
        (False, None, True),
    ],
)
def test_a_special_token_counts_where_the_template_writes_it(tmp_path, special, template, found):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as FastTokenizer

    make_tokenizer(tmp_path, template=template)
    fast = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rows = fast.get_vocab_size()
    fast.add_tokens([AddedToken("<image>", special=special, normalized=False)])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.token_beyond(rows) == ((rows, "<image>") if found else None)
    reached = max(tokenizer.encode("an <image>")) >= rows
    assert reached == (not special)
    assert tokenizer.token_beyond(rows + 1) is None


def test_token_of_an_id(tokenizer):
    assert tokenizer.token(1) == SPECIAL[1]
    for token_id in (-1, tokenizer.vocab_size, 2**32, 2**40):
        assert tokenizer.token(token_id) is None


# ---- chat templates ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_equals_transformers(folder, tmp_path, name):
    path = shutil.copytree(folder, tmp_path / "copy")
    (path / "chat_template.jinja").write_text(TEMPLATES[name])
    expected = transformers_tokenizer(path).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert Tokenizer(path).render_chat(MESSAGES) == expected


@pytest.mark.parametrize("form", ["text", "list", "file"])
def test_places_of_a_template(tmp_path, form):
    template = "one {{ messages[0].content }}"
    inside = {
        "text": template,
        "list": [
            {"name": "tool_use", "template": "another"},
            {"name": "default", "template": template},
        ],
        "file": "hidden by the file",
    }[form]
    make_tokenizer(tmp_path, template=inside)
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    assert Tokenizer(tmp_path).render_chat(MESSAGES) == "one Answer <b>briefly</b>."


def test_token_written_as_an_object(tmp_path):
    token = {"content": SPECIAL[2], "lstrip": False, "special": True}
    make_tokenizer(tmp_path, template="{{ eos_token }}!", eos_token=token)
    assert Tokenizer(tmp_path).render_chat(MESSAGES) == SPECIAL[2] + "!"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{% for m in messages %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ nothing.at.all }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
    ],
)
def test_template_that_fails_is_a_model_error(tmp_path, template):
    make_tokenizer(tmp_path, template=template)
    with pytest.raises(ModelError, match="chat template"):
        Tokenizer(tmp_path).render_chat(MESSAGES)


def test_no_template(tmp_path):
    make_tokenizer(tmp_path, template=None)
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer(tmp_path).render_chat(MESSAGES)


# ---- streaming -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=CHARACTERS)
@example(text=TEXT)
@example(text="👩‍👩‍👧🏽 é́ \ufffd and more")
def test_stream_gives_whole_characters_and_all_of_them(tokenizer, text):
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in tokenizer.encode(text)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    # A text that ends in U+FFFD cannot be told from one that ends in half a character.
    assert "".join(pieces) == text or (text.endswith("\ufffd") and text.startswith("".join(pieces)))


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=40))
@example(ids=[0, 1, 2])
def test_stream_of_any_ids_is_a_beginning_of_their_text(tokenizer, ids):
    """A model may say any ids, bytes that are no UTF-8 and control tokens among them."""
    stream = tokenizer.stream()
    text = "".join(stream.push(token_id) for token_id in ids)
    whole = tokenizer.decode(ids)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"} or whole.endswith("\ufffd")


def test_streams_do_not_mix(tokenizer):
    ids = tokenizer.encode("東京😀")
    one, two = tokenizer.stream(), tokenizer.stream()
    both = [(one.push(token_id), two.push(token_id)) for token_id in ids]
    assert "".join(a for a, _ in both) == "".join(b for _, b in both) == "東京😀"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{{ messages }}", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_template_file_that_is_no_text(tmp_path, content):
    make_tokenizer(tmp_path, template=None)
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ModelError, match=r"chat_template\.jinja"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("template", [[{"x": 1}], ["x"], [None]])
def test_a_list_of_templates_that_is_none(tmp_path, template):
    make_tokenizer(tmp_path, template=None)
    options = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(options | {"chat_template": template})
    )
    with pytest.raises(ModelError, match="chat_template"):
        Tokenizer(tmp_path)


def test_the_layout_depends_on_the_named_tokens(tmp_path):
    digests = set()
    for number, bos in enumerate(("<|endoftext|>", "<|im_start|>")):
        make_tokenizer(tmp_path / str(number), bos_token=bos)
        digests.add(Tokenizer(tmp_path / str(number)).template_digest)
    assert len(digests) == 2
