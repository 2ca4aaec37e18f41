"""Reading numbers out of a model's config.json, where anything may stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvrag.errors import UnsupportedModelError

__all__ = ["flag", "object_of", "positive", "size", "token_id_list"]

#: Larger ones are no setting of a model, and do not fit into what is calculated from them.
_LARGEST = 1e30
_LARGEST_SIZE = 2**31 - 1


def size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A positive whole number; `default` where the entry is missing or null.

    Raises:
        UnsupportedModelError: it is something else.
    """
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_SIZE:
        return value
    raise UnsupportedModelError(
        f"{name} is {value!r} in the model's config; a positive whole number up to "
        f"{_LARGEST_SIZE} is needed"
    )


def positive(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number up to 1e30; `default` where the entry is missing or null.

    Raises:
        UnsupportedModelError: it is something else.
    """
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST:
        return float(value)
    raise UnsupportedModelError(
        f"{name} is {value!r} in the model's config; a positive number is needed"
    )


def flag(config: Mapping[str, Any], name: str) -> bool:
    """True or false; false where the entry is missing or null.

    Raises:
        UnsupportedModelError: it is something else.
    """
    value = config.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise UnsupportedModelError(
        f"{name} is {value!r} in the model's config; true or false is needed"
    )


def object_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A JSON object; empty where the entry is missing or null.

    Raises:
        UnsupportedModelError: it is something else.
    """
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UnsupportedModelError(
            f"{name} is {value!r} in the model's config; a JSON object is needed"
        )
    return dict(value)


def token_id_list(value: Any) -> tuple[int, ...]:
    """Hugging Face writes one id, a list of ids or null; make it a tuple.

    Raises:
        UnsupportedModelError: it is something else.
    """
    items = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise UnsupportedModelError(
            f"eos_token_id is {value!r}; a token id or a list of them is needed"
        )
    return tuple(items)
