"""How to continue a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

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

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From options by name; `stop` may be one text, a list or None.

        Raises:
            InputError: also for an unknown option.
        """
        known = cls.__dataclass_fields__
        if unknown := options.keys() - known.keys():
            raise InputError(
                f"unknown option {min(unknown)!r}; generation options are {', '.join(known)}"
            )
        stop = options.get("stop", ())
        if isinstance(stop, str):
            stop = (stop,)
        elif stop is None or isinstance(stop, list):
            stop = tuple(stop or ())
        return cls(**{**options, "stop": stop})

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1)
        _whole("top_k", self.top_k, 0)
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**63 - 1)
        _number("temperature", self.temperature, lambda value: value >= 0, "0 or more")
        _number("top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1")
        texts = isinstance(self.stop, tuple) and all(
            isinstance(text, str) and text for text in self.stop
        )
        _check("stop", self.stop, texts, "texts that are not empty")


def _whole(name: str, value: object, low: int, high: int | None = None) -> None:
    fits = (
        isinstance(value, int)
        and not isinstance(value, bool)
        and value >= low
        and (high is None or value <= high)
    )
    most = "" if high is None else f" and at most {high}"
    _check(name, value, fits, f"a whole number, at least {low}{most}")


def _number(name: str, value: object, fits: Callable[[float], bool], rule: str) -> None:
    allowed = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and fits(value)
    )
    _check(name, value, allowed, f"a number, {rule}")


def _check(name: str, value: object, allowed: bool, rule: str) -> None:
    if not allowed:
        raise InputError(f"{name} is {value!r}; it must be {rule}")
