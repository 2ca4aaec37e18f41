"""Filters: SQLite's answer against the same filter in Python, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrag.retrieval import ChunkInput, Document, FilterError, Where

from .helpers import EMBEDDER, TOKENIZER, open_catalog, unit_vectors

NAMES = ["a", 'b"\\', "c.d", ""]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, 1.0, -2.5, 2.0**52]),
    st.sampled_from(["", "1", "true", "x", "é", "2020-01-01"]),
)
metadata = st.dictionaries(
    st.sampled_from(NAMES), scalars | st.lists(scalars, max_size=3) | st.just({"n": 1}), max_size=3
)
comparable = scalars.filter(lambda v: v is not None and not isinstance(v, bool))
tests_ = st.one_of(
    scalars,
    st.dictionaries(st.sampled_from(["gt", "gte", "lt", "lte"]), comparable, min_size=1),
    st.fixed_dictionaries({"in": st.lists(scalars, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"eq": scalars}),
)
filters = st.dictionaries(st.sampled_from(NAMES), tests_, min_size=1, max_size=2)


def kind(value):
    if value is None or isinstance(value, bool):
        return type(value)
    return str if isinstance(value, str) else float


def equal(value, wanted):
    return kind(value) is kind(wanted) and value == wanted


def element_passes(value, test):
    if not isinstance(test, dict):
        return equal(value, test)
    compare = {
        "gt": lambda a, b: a > b,
        "gte": lambda a, b: a >= b,
        "lt": lambda a, b: a < b,
        "lte": lambda a, b: a <= b,
    }
    for operator, wanted in test.items():
        if operator == "eq":
            held = equal(value, wanted)
        elif operator == "in":
            held = any(equal(value, item) for item in wanted)
        else:
            same = not isinstance(value, list | dict) and kind(value) is kind(wanted)
            held = same and compare[operator](value, wanted)
        if not held:
            return False
    return True


def passes(fields, where):
    for name, test in where.items():
        if name not in fields:
            return False
        value = fields[name]
        candidates = value if isinstance(value, list) else [value]
        if not any(not isinstance(v, dict) and element_passes(v, test) for v in candidates):
            return False
    return True


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    with open_catalog(tmp_path_factory.mktemp("where")) as opened:
        yield opened


numbers = iter(range(10**9))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(metadata | st.none(), min_size=1, max_size=6), st.lists(filters, min_size=3))
def test_a_filter_passes_what_it_says(catalog, documents, wheres):
    namespace = f"n{next(numbers)}"
    ids = {}
    for number, fields in enumerate(documents):
        document = Document(f"text {number}", metadata=fields)
        catalog.add_document(
            namespace,
            document,
            [ChunkInput("", "text", [1])] * 2,
            tokenizer=TOKENIZER,
            vectors=unit_vectors(1, 2),
            embedder=EMBEDDER,
        )
        ids[number] = catalog.document_chunks(namespace, document.id)
    for where in wheres:
        expected = sorted(
            i for n, fields in enumerate(documents) if passes(fields or {}, where) for i in ids[n]
        )
        assert catalog.chunk_ids_where(namespace, Where.parse(where)).tolist() == expected


def test_equal_filters_have_equal_texts():
    one, other = {"a": 1, "b": {"in": ["x"]}}, {"b": {"in": ["x"]}, "a": 1}
    assert Where.parse(one).text == Where.parse(other).text != Where.parse({"a": 1}).text


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({}, "one field or more"),
        ([1], "one field or more"),
        ({f"f{i}": 1 for i in range(33)}, "at most 32 fields"),
        ({1: 2}, "are strings"),
        ({"a": {}}, "allowed are eq, in, gt"),
        ({"a": {"like": "x"}}, r"\['like'\]; allowed are eq, in, gt"),
        ({"a": {"in": []}}, "1 to 1000 values"),
        ({"a": {"in": "xy"}}, "a list of 1 to 1000"),
        ({"a": {"in": [[1]]}}, "allowed are a text, a number"),
        ({"a": [1]}, "allowed are a text, a number"),
        ({"a": {"gt": True}}, "gt takes a number or a text"),
        ({"a": {"lt": None}}, "lt takes a number or a text"),
        ({"a": 2**63}, "does not fit 64 bits"),
        ({"a": float("nan")}, "does not fit 64 bits"),
        ({"a": "\ud800"}, "not valid Unicode"),
        ({"\ud800": 1}, "not valid Unicode"),
    ],
)
def test_what_cannot_be_applied_is_refused(where, reason):
    with pytest.raises(FilterError, match=reason):
        Where.parse(where)
