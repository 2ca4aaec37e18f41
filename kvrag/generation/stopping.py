"""Stop texts in a stream whose pieces need not end where a stop text ends."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopTexts"]


class StopTexts:
    """Lets text through as soon as no stop text can begin in it."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is certain now. After `found`, what stood before the stop text."""
        self._held += piece
        # The one that is complete first, so that the pieces' borders make no difference.
        found = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.found = True
            _, start = min(found)
            sure, self._held = self._held[:start], ""
            return sure
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - keep
        sure, self._held = self._held[:cut], self._held[cut:]
        return sure

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        sure, self._held = self._held, ""
        return sure


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0
