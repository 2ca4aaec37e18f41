"""Whether a tier is worth asking: after a failure it is left alone for a while, then tried."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Clock", "Health"]

Clock = Callable[[], float]

_FIRST_S = 1.0
_LONGEST_S = 60.0


class Health:
    """Back-off of one tier: 1 s after a failure, doubled by each further one, at most 60 s.

    Any success ends the pause, but its length is forgotten only when the same kind of operation
    works: a tier that answers look-ups and hangs on reads is left alone longer and longer.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pause_s = 0.0  # 0: healthy
        self._until = 0.0
        self._tried = False
        self._last_pauses_s: dict[str, float] = {}  # by kind, of those that have not worked since

    @property
    def healthy(self) -> bool:
        """Whether the last attempt worked."""
        return not self._pause_s  # one number, which every look-up asks for: without the lock

    def claim_trial(self) -> bool:
        """Whether to try the tier now: the pause is over, and nobody else tries.

        Who is told so must call `end_trial`, whatever comes of it.
        """
        if not self._pause_s:
            return False
        with self._lock:
            due = bool(self._pause_s) and not self._tried and self._clock() >= self._until
            self._tried = self._tried or due
            return due

    def end_trial(self) -> None:
        """The trial is over; how it went was told by `failed` or `worked`."""
        with self._lock:
            self._tried = False

    def failed(self, kind: str) -> float:
        """An attempt failed; the pause in seconds. Failures during a pause do not lengthen it."""
        with self._lock:
            now = self._clock()
            if not self._pause_s or now >= self._until:
                last_s = max(self._pause_s, self._last_pauses_s.get(kind, 0.0))
                self._pause_s = min(max(_FIRST_S, 2 * last_s), _LONGEST_S)
                self._until = now + self._pause_s
                self._last_pauses_s[kind] = self._pause_s
            return self._pause_s

    def worked(self, kind: str) -> bool:
        """An attempt worked; whether the tier was unhealthy before."""
        with self._lock:
            recovered = bool(self._pause_s)
            self._pause_s = 0.0
            self._last_pauses_s.pop(kind, None)
            return recovered
