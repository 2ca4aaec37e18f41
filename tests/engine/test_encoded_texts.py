"""Passages asked about lately are not encoded again, and are the same ids."""

from __future__ import annotations

import threading

import pytest

from kvrag.encoded_texts import EncodedTexts
from kvrag.errors import PromptTooLongError
from kvrag.passages import MAX_PASSAGE_TOKENS, passage_chunks


class Words:
    """A tokenizer of words that counts what it encodes."""

    def __init__(self):
        self.encoded = []

    def encode(self, text):
        self.encoded.append(text)
        return [len(word) for word in text.split()]


def test_a_text_is_encoded_once():
    words = Words()
    texts = EncodedTexts(words)
    assert texts.encode("one three") == texts.encode("one three") == (3, 5)
    assert texts.encode("one") == (3,)
    assert words.encoded == ["one three", "one"]
    texts.clear()
    assert texts.encode("one") == (3,)
    assert words.encoded == ["one three", "one", "one"]


def test_the_texts_used_longest_ago_are_forgotten():
    words = Words()
    texts = EncodedTexts(words, most_tokens=4)
    texts.encode("a b")
    texts.encode("c d")
    texts.encode("a b")
    texts.encode("e")  # too many: c d goes
    texts.encode("a b")
    texts.encode("e")
    assert words.encoded == ["a b", "c d", "e"]
    texts.encode("c d")
    assert words.encoded == ["a b", "c d", "e", "c d"]


def test_a_text_that_exceeds_the_bound_is_encoded_and_not_kept():
    words = Words()
    texts = EncodedTexts(words, most_tokens=2)
    for _ in range(2):
        assert texts.encode("a b c") == (1, 1, 1)
    assert len(words.encoded) == 2


def test_many_threads_see_the_same_ids():
    texts, found = EncodedTexts(Words(), most_tokens=20), []

    def ask():
        found.extend(texts.encode("a " * n) == (1,) * n for n in [*range(12)] * 20)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 240
    assert all(found)


def test_passages_are_checked_every_time():
    """What is remembered is the ids, not that they were allowed."""
    texts = EncodedTexts(Words())
    for _ in range(2):
        with pytest.raises(PromptTooLongError):
            passage_chunks(["a " * (MAX_PASSAGE_TOKENS + 1)], texts)
