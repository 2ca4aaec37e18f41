"""Computing a block once, however many want it at the same time.

Who comes first computes; the others wait and take what it made. If it fails or is cancelled, the
next of them computes. Nobody holds one block while waiting for another, so requests that share
several in different order cannot wait for each other; and nobody waits for longer than it says.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvrag.store.block import Block
from kvrag.store.claims import Claims
from kvrag.store.keys import BlockKey

__all__ = ["Made", "SingleFlight"]

#: Seconds between two looks whether one who waits was cancelled, and at another process's claim.
_ASK_S = 0.02


@dataclass(frozen=True, slots=True)
class Made:
    """A block, whether it was computed here, and for how many seconds another was waited for."""

    block: Block
    computed: bool
    waited_s: float


class _Flight:
    """One computation; `block` is None until it has worked."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.block: Block | None = None


class SingleFlight:
    """Threads of this process, and with `claims` other processes that use the same. Thread-safe."""

    def __init__(self, claims: Claims | None = None) -> None:
        self._claims = claims
        self._lock = threading.Lock()
        self._flights: dict[BlockKey, _Flight] = {}

    def make(
        self,
        key: BlockKey,
        compute: Callable[[], Block],
        *,
        load: Callable[[], Block | None],
        cancelled: Callable[[], bool],
        most_s: float,
    ) -> Made | None:
        """What `compute` makes, here or by another who began before; None if cancelled.

        Args:
            compute: makes the block and stores it. What it raises passes, to its own caller alone.
            load: the block, if somebody has stored it by now, or None.
            cancelled: asked while waiting.
            most_s: seconds to wait for others at most, after which it is computed here, too.
        """
        begun = time.monotonic()
        while True:
            with self._lock:
                other = self._flights.get(key)
                if other is None:
                    flight = self._flights[key] = _Flight()
                    break
            while not other.ended.wait(_ASK_S):
                if cancelled():
                    return None
                if time.monotonic() - begun >= most_s:
                    return Made(compute(), computed=True, waited_s=time.monotonic() - begun)
            if other.block is not None:
                return Made(other.block, computed=False, waited_s=time.monotonic() - begun)
        try:
            made = self._lead(key, compute, load, cancelled, begun, most_s)
            flight.block = None if made is None else made.block
            return made
        finally:
            with self._lock:
                del self._flights[key]
            flight.ended.set()

    def close(self) -> None:
        """Give all claims back."""
        if self._claims is not None:
            self._claims.close()

    def _lead(
        self,
        key: BlockKey,
        compute: Callable[[], Block],
        load: Callable[[], Block | None],
        cancelled: Callable[[], bool],
        begun: float,
        most_s: float,
    ) -> Made | None:
        """As `make`, for the one thread of this process that does."""
        claims = self._claims
        claimed = claims is not None and claims.claim(key)
        while claims is not None and not claimed and time.monotonic() - begun < most_s:
            if cancelled():
                return None
            time.sleep(_ASK_S)
            claimed = claims.claim(key)
        waited_s = time.monotonic() - begun
        try:
            # Since it was missed, another may have begun with it and ended.
            if (block := load()) is not None:
                return Made(block, computed=False, waited_s=waited_s)
            return Made(compute(), computed=True, waited_s=waited_s)
        finally:
            if claims is not None and claimed:
                claims.release(key)
