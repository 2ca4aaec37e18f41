from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrag.retrieval.terms import terms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The lamp, the LAMP!", ["the", "lamp", "the", "lamp"]),
        ('say "no" OR col:* -NEAR(a b)', ["say", "no", "or", "col", "near", "a", "b"]),
        ("Élan Straße №5 ﬁn", ["elan", "strasse", "no5", "fin"]),
        ("e\u0301lan", ["elan"]),
        ("東京タワーは333m", ["東京", "京タ", "タワ", "ワー", "ーは", "333m"]),
        ("水", ["水"]),
        ("ภาษาไทย", ["ภา", "าษ", "ษา", "าไ", "ไท", "ทย"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("snake_case\0x", ["snake", "case", "x"]),
        ("a" * 100, ["a" * 64]),
        ("👩‍👩‍👧 ,;", []),
    ],
)
def test_terms(text, expected):
    assert terms(text) == expected


@given(st.text())
def test_any_text_has_terms_that_a_query_can_quote(text):
    for term in terms(text):
        assert 0 < len(term) <= 64
        assert not set(term) & set('"\0 \n_')
