"""Token ids of passages that were asked about lately.

Who asks about the same passages again loads their KV in less time than encoding them takes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from kvrag.models.tokenizer import Tokenizer

__all__ = ["EncodedTexts"]

#: Of a thousand passages; with their texts some 12 MB.
MOST_TOKENS = 2**18


class EncodedTexts:
    """`Tokenizer.encode`, which remembers the texts used last. Thread-safe.

    Args:
        most_tokens: tokens remembered at most, over all texts.
    """

    def __init__(self, tokenizer: Tokenizer, most_tokens: int = MOST_TOKENS) -> None:
        self._tokenizer, self._most_tokens = tokenizer, most_tokens
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._tokens = 0

    def encode(self, text: str) -> tuple[int, ...]:
        """See `Tokenizer.encode`."""
        with self._lock:
            known = self._known.get(text)
            if known is not None:
                self._known.move_to_end(text)
                return known
        token_ids = tuple(self._tokenizer.encode(text))
        with self._lock:
            if text not in self._known:
                self._known[text] = token_ids
                self._tokens += len(token_ids)
            while self._tokens > self._most_tokens:
                self._tokens -= len(self._known.popitem(last=False)[1])
        return token_ids

    def clear(self) -> None:
        """Forget all texts."""
        with self._lock:
            self._known.clear()
            self._tokens = 0
