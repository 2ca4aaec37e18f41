"""Token ids and chat templates of a model folder, by the `tokenizers` library.

The chat template is the model's own and is rendered as transformers renders it; whatever a user or
a document brings is encoded as plain text, so that a document cannot write control tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from kvrag.errors import ModelError, ModelNotFoundError
from kvrag.models.folder import is_lfs_pointer, read_json

__all__ = ["TokenStream", "Tokenizer"]

#: The named tokens that a chat template may write.
_NAMED_TOKENS = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class Tokenizer:
    """Thread-safe: encoding and decoding change no state.

    `bos_ids` are the ids that the tokenizer itself puts in front of a text; the methods here never
    do so, since a chat template writes its own.

    Raises:
        ModelNotFoundError: the folder has no tokenizer.json.
        ModelError: a tokenizer file is malformed.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            content = path.read_bytes()
        except FileNotFoundError as exc:
            raise ModelNotFoundError(f"{folder} holds no tokenizer.json") from exc
        except OSError as exc:
            raise ModelError(f"{path} cannot be read: {exc.strerror or exc}") from exc
        if is_lfs_pointer(content):
            raise ModelError(
                f"{path} is a Git LFS pointer, not the tokenizer: run `git lfs pull` in {folder}, "
                "or download the file itself"
            )
        try:
            self._plain = FastTokenizer.from_buffer(content)
        except Exception as exc:  # the library raises bare Exception for malformed files
            raise ModelError(f"{path} is no tokenizer: {exc}") from exc
        # What a file says of training batches must not cut or pad a prompt.
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.encode_special_tokens = True
        options = folder / "tokenizer_config.json"
        self._options = read_json(options) if options.exists() else {}
        self._chat_template = _chat_template(folder, self._options)
        self.bos_ids = self._leading_ids()
        self.template_digest = self._layout_digest()
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.vocab_size: int = self._plain.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """False for most base models, which continue a text and know no turns."""
        return self._chat_template is not None

    def token(self, token_id: int) -> str | None:
        """The token of an id, or None where the tokenizer has none."""
        return self._plain.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def token_beyond(self, rows: int) -> tuple[int, str] | None:
        """A token that a prompt may hold and an embedding of `rows` rows has no row for, or None.

        Special tokens never come from text, so one of them counts only if the chat template
        writes it: text-only models are published with the image tokens of their family.
        """
        beyond = {
            token_id: text
            for text, token_id in self._plain.get_vocab(with_added_tokens=True).items()
            if token_id >= rows
        }
        special = self._plain.get_added_tokens_decoder()
        for token_id, text in sorted(beyond.items()):
            from_text = token_id not in special or not special[token_id].special
            if from_text or text in (self._chat_template or ""):
                return token_id, text
        return None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, and control tokens written in it stay letters."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of a rendered template, in which control tokens are control tokens."""
        ids: list[int] = self._template.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, without control tokens."""
        text: str = self._plain.decode(list(token_ids), skip_special_tokens=True)
        return text

    def stream(self) -> TokenStream:
        """A new incremental decoder."""
        return TokenStream(self._plain)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The model's chat template with the generation prompt.

        Args:
            messages: role and content, which is a text or a list of `{"type": "text", "text": …}`.

        Raises:
            ModelError: the model has none, or it refuses the messages.
        """
        if self._chat_template is None:
            raise ModelError(
                "the model has no chat template (tokenizer_config.json or chat_template.jinja)"
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        # A token that the model does not have is undefined, which templates ask for.
        tokens = {
            name: text for name in _NAMED_TOKENS if (text := _token_text(self._options.get(name)))
        }
        try:
            return environment.from_string(self._chat_template).render(
                messages=list(messages),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **tokens,
            )
        except Exception as exc:  # a template is a program and may raise anything
            raise ModelError(f"the model's chat template failed: {exc}") from exc

    @cached_property
    def _template(self) -> FastTokenizer:
        """A second instance, since "are special tokens text?" is a state of the library's object.

        Its text form does not hold that state. Made when it is needed, which is once for a store:
        large vocabularies take seconds.
        """
        return FastTokenizer.from_str(self._plain.to_str())

    def _layout_digest(self) -> str:
        """Of what a prompt's layout depends on beside the ids themselves."""
        if self._chat_template is None:
            layout = [str(self.bos_ids)]
        else:
            named = (_token_text(self._options.get(name)) for name in _NAMED_TOKENS)
            layout = [self._chat_template, *named]
        return hashlib.blake2b(json.dumps(layout).encode(), digest_size=16).hexdigest()

    def _leading_ids(self) -> tuple[int, ...]:
        """By the post-processor of tokenizer.json, else by what tokenizer_config.json asks for."""
        encoded = self._plain.encode("a")
        count = [*encoded.special_tokens_mask, 0].index(0)
        bos = _token_text(self._options.get("bos_token"))
        if not count and bos and self._options.get("add_bos_token"):
            bos_id = self._plain.token_to_id(bos)
            return () if bos_id is None else (bos_id,)
        return tuple(encoded.ids[:count])


class TokenStream:
    """Ids in, text out, never a part of a character."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is unfinished."""
        return self._stream.step(self._tokenizer, token_id) or ""


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model is trained on; here it shows its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML would, which a model must not see."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _token_text(value: Any) -> str:
    """Hugging Face writes a token as text or as an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _chat_template(folder: Path, options: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            content = path.read_bytes()
            if is_lfs_pointer(content):
                raise ModelError(f"{path} is a Git LFS pointer, not the template")
            return content.decode()
        except (OSError, UnicodeDecodeError) as exc:
            raise ModelError(f"{path} cannot be read as text: {exc}") from exc
    template = options.get("chat_template")
    if isinstance(template, list):  # several named ones
        try:
            template = {item["name"]: item["template"] for item in template}.get("default")
        except (LookupError, TypeError) as exc:
            raise ModelError(
                f"{folder / 'tokenizer_config.json'} has a chat_template that is neither a text "
                "nor a list of objects with name and template"
            ) from exc
    return template if isinstance(template, str) else None
