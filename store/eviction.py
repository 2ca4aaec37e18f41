"""Eviction policies. A policy is a key function: the entry with the smallest value goes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ledger import Entry

__all__ = ["Policy", "lru"]

Policy = Callable[["Entry"], float]


def lru(entry: Entry) -> float:
    """The least recently used first."""
    return entry.last_used
