"""Token ids and chat templates of a model folder, by the `tokenizers` library.

The chat template is the model's own and is rendered as transformers renders it; whatever a user or
a document brings is encoded as plain text, so that a document cannot write control tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from kvrag.errors import ModelError, ModelNotFoundError
from kvrag.models.weights import read_json

__all__ = ["TokenStream", "Tokenizer"]


class Tokenizer:
    """Thread-safe: encoding and decoding change no state.

    Raises:
        ModelNotFoundError: the folder has no tokenizer.json.
        ModelError: a tokenizer file is malformed, or the model has no chat template.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            content = path.read_text(encoding="utf-8")
            # Two instances, since "are special tokens text?" is a state of the library's object.
            self._template = FastTokenizer.from_str(content)
            self._plain = FastTokenizer.from_str(content)
        except FileNotFoundError as exc:
            raise ModelNotFoundError(f"{folder} holds no tokenizer.json") from exc
        except Exception as exc:  # the library raises bare Exception for malformed files
            raise ModelError(f"{path} is no tokenizer: {exc}") from exc
        for tokenizer in (self._template, self._plain):
            # What a file says of training batches must not cut or pad a prompt.
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        options = folder / "tokenizer_config.json"
        self._options = read_json(options) if options.exists() else {}
        self._chat_template = _chat_template(folder, self._options)
        self.template_digest = hashlib.blake2b(
            (self._chat_template or "").encode(), digest_size=16
        ).hexdigest()
        self.digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        self.vocab_size: int = self._plain.get_vocab_size(with_added_tokens=True)

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

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's chat template with the generation prompt.

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
        environment.filters["tojson"] = lambda value, **kw: json.dumps(
            value, ensure_ascii=False, **kw
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: _token_text(self._options.get(name)) for name in names}
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
        return path.read_text(encoding="utf-8")
    template = options.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template if isinstance(template, str) else None
