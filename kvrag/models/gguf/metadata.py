"""The metadata of a GGUF file, read key by key, so that what nobody reads can be refused.

A key of the architecture that is left over changes the model in a way that nobody here knows, and
a model that is nearly right answers wrongly without an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf.constants import TokenType

from kvrag.errors import ModelError, UnsupportedModelError

__all__ = ["Metadata"]

#: Keys of any architecture that do not change what is computed …
_NO_MATTER = ("vocab_size", "tensor_data_layout")
#: … and those that do not at this value.
_NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "rope.scaling.finetuned": True,
    "rope.scaling.yarn_ext_factor": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "attn_logit_softcapping": 0.0,
}


class Metadata:
    """Keys of one architecture, such as `size("block_count")`, and of the tokenizer.

    Raises:
        ModelError: a key is missing or its value is impossible; names file and key.
    """

    def __init__(self, file: str, fields: Mapping[str, Any]) -> None:
        self.file = file
        self.fields = fields
        self.architecture = str(fields.get("general.architecture"))
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """A value of the architecture; None when the file does not have it."""
        self._read.add(name)
        return self.fields.get(f"{self.architecture}.{name}")

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self._given(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self._impossible(name, value, "a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number. GGUF keeps float32: given back is the decimal that stands for it."""
        value = self._given(name, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise self._impossible(name, value, "a finite number")
        return float(str(np.float32(value)))

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(name, default)
        if value <= 0:
            raise self._impossible(name, value, "a number above 0")
        return value

    def optional_size(self, name: str) -> int | None:
        """A positive whole number; None where the file has 0 or nothing."""
        return self.size(name) if self.get(name) else None

    def tokenizer(self, name: str) -> Any:
        key = f"tokenizer.ggml.{name}"
        if key not in self.fields:
            raise ModelError(f"{self.file} lacks the key {key}")
        return self.fields[key]

    def token_list(self, name: str, kind: type, *, length: int | None = None) -> list[Any]:
        """A list of the tokenizer with items of one `kind`, and of `length`."""
        value = self.tokenizer(name)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ModelError(
                f"{self.file}: tokenizer.ggml.{name} is no list of {kind.__name__} values"
            )
        if length is not None and len(value) != length:
            raise ModelError(
                f"{self.file}: tokenizer.ggml.{name} has {len(value)} entries for {length} tokens"
            )
        return value

    def token_types(self) -> list[TokenType]:
        """The kind of each token.

        `<|…|>` is a control token even where an older converter called it user-defined: no
        document may write one.
        """
        tokens = self.token_list("tokens", str)
        numbers = self.token_list("token_type", int, length=len(tokens))
        try:
            types = [TokenType(number) for number in numbers]
        except ValueError as exc:
            raise ModelError(f"{self.file}: tokenizer.ggml.token_type: {exc}") from exc
        return [
            TokenType.CONTROL
            if kind is TokenType.USER_DEFINED and token.startswith("<|") and token.endswith("|>")
            else kind
            for token, kind in zip(tokens, types, strict=True)
        ]

    def token_id(self, name: str) -> int | None:
        """The id of a named token (`bos`, `unknown` …); None when the file names none."""
        value = self.fields.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        length = len(self.tokenizer("tokens"))
        if not isinstance(value, int) or not 0 <= value < length:
            raise ModelError(
                f"{self.file}: tokenizer.ggml.{name}_token_id is {_shown(value)}, but there are "
                f"{length} tokens"
            )
        return value

    def check_all_read(self) -> None:
        """Refuse what is left over.

        Raises:
            UnsupportedModelError: names the key and its value.
        """
        for name, neutral in _NEUTRAL.items():
            if (value := self.get(name)) is not None and value != neutral:
                raise self._unsupported(name, value)
        self._read.update(_NO_MATTER)
        prefix = f"{self.architecture}."
        for key, value in self.fields.items():
            if key.startswith(prefix) and key.removeprefix(prefix) not in self._read:
                raise self._unsupported(key.removeprefix(prefix), value)
        if (parts := self.fields.get("split.count", 1)) not in (0, 1):
            raise UnsupportedModelError(
                f"{self.file} is one of {parts} files of a model; join them with "
                "`llama-gguf-split --merge`"
            )

    def _given(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.file} lacks the key {self.architecture}.{name}")
        return value

    def _impossible(self, name: str, value: Any, needed: str) -> ModelError:
        return ModelError(
            f"{self.file}: {self.architecture}.{name} is {_shown(value)}; {needed} is needed"
        )

    def _unsupported(self, name: str, value: Any) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.file}: {self.architecture}.{name} = {_shown(value)} is not supported; "
            "use the model's Hugging Face folder"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
