"""Filters over documents' metadata: parsed once, applied by SQLite before anything is ranked.

    {"lang": "en", "year": {"gte": 2000, "lt": 2010}, "tag": {"in": ["sea", "air"]}}

Every field must hold. A field is a name at the top of the metadata; a list there holds if one of
its elements does. Nothing equals a value of another JSON type: 1 is neither "1" nor true.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import FilterError

__all__ = ["Where"]

_MOST_FIELDS = 32
_MOST_VALUES = 1000
_COMPARISONS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_OPERATORS = ("eq", "in", *_COMPARISONS)

_Condition = tuple[str, tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class Where:
    """A filter. `text` is its canonical form: equal filters have equal texts."""

    text: str
    _conditions: tuple[tuple[str, tuple[_Condition, ...]], ...]

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Where:
        """A filter from its JSON form; raises FilterError that says what is allowed."""
        if not isinstance(fields, Mapping) or not fields:
            raise FilterError(f"a filter is an object of one field or more, got {fields!r:.80}")
        if len(fields) > _MOST_FIELDS:
            raise FilterError(f"a filter has at most {_MOST_FIELDS} fields, got {len(fields)}")
        conditions = tuple((_name(name), _tests(name, test)) for name, test in fields.items())
        return cls(json.dumps(dict(fields), sort_keys=True), conditions)

    def sql(self, metadata: str) -> _Condition:
        """A condition on the column `metadata`, and its values."""
        clauses, values = [], []
        for name, tests in self._conditions:
            field, field_values = _all("m", tests)
            element, element_values = _all("e", tests)
            clauses.append(
                f"EXISTS (SELECT 1 FROM json_each({metadata}) m WHERE m.key = ? AND ("
                f"{field} OR m.type = 'array' AND EXISTS ("
                f"SELECT 1 FROM json_each(m.value) e WHERE {element})))"
            )
            values += [name, *field_values, *element_values]
        return " AND ".join(clauses), tuple(values)


def _all(alias: str, tests: tuple[_Condition, ...]) -> tuple[str, list[object]]:
    clauses = [
        sql.replace("?t", f"{alias}.type").replace("?v", f"{alias}.value") for sql, _ in tests
    ]
    return f"({' AND '.join(clauses)})", [value for _, values in tests for value in values]


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise FilterError(f"fields of a filter are strings, got {name!r:.80}")
    _check_text("the field", name)
    return name


def _tests(name: str, test: object) -> tuple[_Condition, ...]:
    if not isinstance(test, Mapping):
        return (_equal(name, test),)
    if not test or not set(test) <= set(_OPERATORS):
        raise FilterError(
            f"field {name!r} of the filter has {sorted(map(str, test))}; "
            f"allowed are {', '.join(_OPERATORS)}"
        )
    return tuple(_operator(name, operator, value) for operator, value in test.items())


def _operator(name: str, operator: str, value: object) -> _Condition:
    if operator == "eq":
        return _equal(name, value)
    if operator == "in":
        return _any_of(name, value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise FilterError(
            f"field {name!r} of the filter: {operator} takes a number or a text, got {value!r:.80}"
        )
    kinds, given = _typed(name, value)
    return f"?t IN ({kinds}) AND ?v {_COMPARISONS[operator]} ?", given


def _any_of(name: str, value: object) -> _Condition:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= _MOST_VALUES:
        raise FilterError(
            f"field {name!r} of the filter: in takes a list of 1 to {_MOST_VALUES} values, "
            f"got {value!r:.80}"
        )
    equals = [_equal(name, item) for item in value]
    return (
        f"({' OR '.join(f'({sql})' for sql, _ in equals)})",
        tuple(given for _, values in equals for given in values),
    )


def _equal(name: str, value: object) -> _Condition:
    if value is None:
        return "?t = 'null'", ()
    if isinstance(value, bool):
        return f"?t = '{'true' if value else 'false'}'", ()
    kinds, given = _typed(name, value)
    return f"?t IN ({kinds}) AND ?v = ?", given


def _typed(name: str, value: object) -> tuple[str, tuple[object, ...]]:
    """SQLite's names of the JSON types that a number or a text compares with, and the value."""
    if isinstance(value, str):
        _check_text(f"field {name!r}", value)
        return "'text'", (value,)
    if isinstance(value, int | float):
        if not -(2**63) <= value < 2**63:  # false for nan, too
            raise FilterError(f"field {name!r} of the filter: {value!r:.40} does not fit 64 bits")
        return "'integer', 'real'", (value,)
    raise FilterError(
        f"field {name!r} of the filter is {value!r:.80}; allowed are a text, a number, true, "
        f"false, null, or an object with {', '.join(_OPERATORS)}"
    )


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise FilterError(f"{what} of the filter is not valid Unicode") from exc
