"""How to continue a prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvrag.errors import InputError

__all__ = ["GenerationParams"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """Sampling options; the defaults are greedy.

    Args:
        max_tokens: at most this many new tokens.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches this share.
        top_k: only the k most likely tokens; 0 is all.
        seed: makes sampling repeatable; None draws anew.
        stop: texts that end the answer; they are not part of it.

    Raises:
        InputError: a value is outside its range; the message names it.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        _check("temperature", self.temperature, finite, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all) or more")
        seeded = self.seed is None or 0 <= self.seed < 2**63
        _check("seed", self.seed, seeded, "between 0 and 2**63 - 1")
        texts = all(isinstance(text, str) and text for text in self.stop)
        _check("stop", self.stop, texts, "texts that are not empty")


def _check(name: str, value: object, allowed: bool, rule: str) -> None:
    if not allowed:
        raise InputError(f"{name} is {value!r}; it must be {rule}")
