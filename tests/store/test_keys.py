from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrag.store.errors import InvalidKeyError
from kvrag.store.keys import KINDS, BlockKey, KeyMaker

SECRET = bytes(range(32))


def key(maker=None, **changes):
    parts = {
        "namespace": "acme",
        "kind": "chunk",
        "fingerprint": "model-1",
        "codec": "raw",
        "codec_version": 1,
        "codec_digest": "",
        "prefix_ids": [1, 2],
        "token_ids": [3, 4, 5],
    }
    return (maker or KeyMaker(SECRET)).key(**(parts | changes))


def test_a_key_is_written_and_parsed():
    made = key()
    assert str(made) == f"{made.tag}/{made.digest}"
    assert BlockKey.parse(str(made)) == made
    assert (len(made.tag), len(made.digest)) == (32, 64)
    assert made.tag == KeyMaker(SECRET).tag("acme")


def test_keys_are_frozen():
    """A change makes every stored block a miss: it takes a new scheme number."""
    assert str(key()) == (
        "e5bbdbe81f0f85b400854106fe51bc9d/"
        "f4f9d82e9ea58e8a529d83b2a6a392c19903aecbf3e3725dfea301dc47fcdf16"
    )


def test_what_blocks_are_sealed_by_is_part_of_their_keys_and_not_of_the_tag():
    """A block in clear, or under another key, is never found where a sealed one is meant."""
    made = [key(KeyMaker(SECRET, sealed_by=sealed_by)) for sealed_by in ("", "a" * 32, "b" * 32)]
    assert made[0] == key()
    assert len({one.digest for one in made}) == 3
    assert len({one.tag for one in made}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a" * 32,
        "a" * 32 + "/" + "b" * 63,
        "a" * 31 + "/" + "b" * 64,
        "A" * 32 + "/" + "b" * 64,
        "a" * 32 + "/" + "b" * 64 + "/",
        "a" * 32 + "/" + "b" * 64 + "\n",
        "../" + "a" * 29 + "/" + "b" * 64,
        "." * 32 + "/" + "b" * 64,
        "a" * 32 + "\\" + "b" * 64,
        "a" * 32 + "/" + "b" * 63 + "\0",
        "a" * 32 + "/" + "٣" * 64,
    ],
)
def test_what_is_no_key(text):
    with pytest.raises(InvalidKeyError):
        BlockKey.parse(text)


@pytest.mark.parametrize("part", ["..", "a/b", "", None, b"a" * 32, 5])
def test_parts_that_make_no_key(part):
    with pytest.raises(InvalidKeyError):
        BlockKey(part, "b" * 64)
    with pytest.raises(InvalidKeyError):
        BlockKey("a" * 32, part)


def test_every_part_is_part_of_the_key():
    variants = [
        {},
        {"namespace": "other"},
        {"kind": "swap"},
        {"kind": "vectors"},
        {"kind": "fragment", "context": b"x"},
        {"kind": "fragment", "context": b"y"},
        {"fingerprint": "model-2"},
        {"codec": "int8"},
        {"codec_version": 2},
        {"codec_digest": "ab"},
        {"codec": "ra", "codec_digest": "w"},
        {"prefix_ids": []},
        {"prefix_ids": [1], "token_ids": [2, 3, 4, 5]},
        {"prefix_ids": [1, 2, 3], "token_ids": [4, 5]},
        {"token_ids": [3, 4]},
        {"token_ids": [5, 4, 3]},
    ]
    digests = [key(**change).digest for change in variants]
    digests.append(key(KeyMaker(b"another secret, long enough")).digest)
    assert len(set(digests)) == len(digests)


def test_kinds_never_answer_for_one_another():
    made = {kind: key(kind=kind, context=b"" if kind == "chunk" else b"c").digest for kind in KINDS}
    assert len(set(made.values())) == 4


def test_the_tag_tells_the_namespace_and_nothing_else():
    assert key().tag == key(token_ids=[9]).tag
    tags = {KeyMaker(SECRET).tag(name) for name in ("acme", "acm", "", "Acme", "acme ")}
    assert len(tags) == 5
    assert KeyMaker(SECRET).tag("acme") != KeyMaker(SECRET[::-1]).tag("acme")


@given(
    st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=3), min_size=2, max_size=2),
    st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=3), min_size=2, max_size=2),
)
def test_no_two_splits_meet(one, other):
    same = one == other
    keys = [key(prefix_ids=prefix, token_ids=ids) for prefix, ids in (one, other)]
    assert (keys[0] == keys[1]) == same


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Chunk"},
        {"context": b"x"},
        {"kind": "fragment"},
        {"token_ids": [-1]},
        {"token_ids": [2**32]},
        {"prefix_ids": [1.5]},
        {"namespace": "\ud800"},
        {"fingerprint": "\ud800"},
    ],
)
def test_parts_that_are_refused(change):
    with pytest.raises(InvalidKeyError):
        key(**change)


def test_the_secret_is_checked_and_not_shown():
    for length in (0, 15, 65):
        with pytest.raises(InvalidKeyError, match="16 to 64 bytes"):
            KeyMaker(bytes(length))
    assert "***" in repr(KeyMaker(SECRET))
    assert str(SECRET) not in repr(KeyMaker(SECRET))


def test_keys_sort():
    made = [key(token_ids=[i]) for i in range(5)]
    assert all(a < b for a, b in itertools.pairwise(sorted(made)))
