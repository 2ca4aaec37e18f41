"""Evaluation sets: questions with passages and gold answers, their halves, and longer contexts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvrag.errors import InputError
from kvrag.models.tokenizer import Tokenizer
from kvrag.passages import passage_chunks

__all__ = ["Distractors", "Half", "Item", "drawn", "load_items"]

Half = Literal["even", "odd", "all"]


@dataclass(frozen=True, slots=True)
class Item:
    """A question with its passages and gold answers; items of a group share passages."""

    id: str
    group: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[dict[str, str], ...]


def load_items(path: Path, half: Half) -> list[Item]:
    """Items of one half of a JSONL file (`id, question, answers, passages`, perhaps `group`).

    Even and odd are by group where the file has groups, by line elsewhere.

    Raises:
        InputError: the file cannot be read, or a line lacks a field.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            items = [_item(index, json.loads(line)) for index, line in enumerate(lines)]
    except OSError as exc:
        raise InputError(f"evaluation data {path} cannot be read: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError, IndexError) as exc:
        raise InputError(f"evaluation data {path} has a line of another form: {exc!r}") from exc
    order = {group: place for place, group in enumerate(dict.fromkeys(i.group for i in items))}
    parities = {"even": (0,), "odd": (1,), "all": (0, 1)}[half]
    return [item for item in items if order[item.group] % 2 in parities]


def drawn(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` items at random, or all if there are fewer."""
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:count]


class Distractors:
    """Other items' passages, which make an item's context longer.

    They stand at random places among the item's own, whose order stays. Behind them all they would
    leave the stored KV of what matters as it is, since that depends on what stands before; in
    front, the question would stay near to what matters. An item's draws are its own, so that a
    shorter context is the longer one with passages left out: lengths differ by nothing else.
    """

    def __init__(self, items: Iterable[Item], tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._passages = {p["text"]: p for item in items for p in item.passages}
        self._tokens: dict[str, int] = {}

    def lengthened(self, item: Item, tokens: int) -> Item:
        """The item with so many passages that one more would make more than `tokens` of context.

        One whose own passages are more than that stays as it is.

        Raises:
            InputError: all passages together are fewer tokens.
        """
        rng = random.Random(f"{self._seed} {item.id}")
        own = {passage["text"] for passage in item.passages}
        others = [passage for text, passage in self._passages.items() if text not in own]
        placed, total = list(item.passages), sum(map(self._size, item.passages))
        for passage in rng.sample(others, len(others)):
            total += self._size(passage)
            if total > tokens:
                return replace(item, passages=tuple(placed))
            placed.insert(rng.randint(0, len(placed)), passage)
        raise InputError(
            f"a context of {tokens} tokens cannot be filled: the passages of item {item.id!r} and "
            f"of all others of its half have {total} together"
        )

    def _size(self, passage: dict[str, str]) -> int:
        text = passage["text"]
        if text not in self._tokens:
            (chunk,) = passage_chunks([passage], self._tokenizer)
            self._tokens[text] = len(chunk.token_ids)
        return self._tokens[text]


def _item(index: int, line: dict[str, Any]) -> Item:
    return Item(
        id=str(line["id"]),
        group=str(line.get("group", index)),
        question=line["question"],
        answers=(line["answers"][0], *line["answers"][1:]),
        passages=tuple({"title": p["title"], "text": p["text"]} for p in line["passages"]),
    )
