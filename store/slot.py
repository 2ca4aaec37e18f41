"""A tier in its place in the store: with its limit, its books, its health and its counters."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import BlockFormatError, TierError, TierFullError
from .health import Clock, Health
from .ledger import Ledger
from .stats import TierStats
from .tier import Tier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .block import Block
    from .eviction import Policy
    from .keys import BlockKey

__all__ = ["Slot", "TierSlot"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TierSlot:
    """A tier and how many bytes of blocks it may hold (None: no limit). Raises `ValueError`."""

    tier: Tier
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.limit_bytes is not None and self.limit_bytes < 0:
            raise ValueError(
                f"limit_bytes of {self.tier.name} must be at least 0, or None, "
                f"got {self.limit_bytes}"
            )


class Slot:
    """One tier of a store. Knows nothing of the other tiers."""

    def __init__(self, place: TierSlot, *, clock: Clock, policy: Policy) -> None:
        self.tier = place.tier
        self.name = place.tier.name
        self.durable = place.tier.durable
        self.ledger = Ledger(place.limit_bytes, policy=policy)
        self._health = Health(clock)
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._loaded = False
        self.loaded: Callable[[], None] = lambda: None  # called when the books were filled
        self._load()

    def count(self, **amounts: int) -> None:
        """Add to the counters, which are named as in `TierStats`."""
        with self._lock:
            self._counts.update(amounts)

    def usable(self) -> bool:
        """Whether to ask the tier at all: not while it is left alone after a failure."""
        if not self._health.usable():
            return False
        return self._loaded or self._load()

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Around every operation of the tier: counts and logs outages, and lets them pass."""
        try:
            yield
        except TierFullError as exc:
            self.count(errors=1)  # it cannot be written, but reading goes on
            _log.warning("%s", exc)
            raise
        except TierError as exc:
            self.count(errors=1)
            pause_s = self._health.failed()
            _log.warning("%s; it is bypassed for %g s", exc, pause_s)
            raise
        except BlockFormatError:
            self._worked()
            raise
        else:
            self._worked()

    def contains(self, key: BlockKey, *, unknown: bool) -> bool:
        """Whether the tier holds something under the key; `unknown` if it fails."""
        try:
            with self.asked():
                return self.tier.contains(key)
        except TierError:
            return unknown

    def admit(self, key: BlockKey, block: Block, *, protected: bool) -> str | None:
        """Make room and write; None, or in a sentence why the block is not here."""
        if not self.usable():
            return "the tier is bypassed after a failure"
        reservation = self.ledger.reserve(key, block.nbytes)
        if reservation is None:
            return f"{block.nbytes} bytes do not fit the limit of {self.ledger.limit_bytes}"
        try:
            for victim in reservation.victims:
                with self.asked():
                    self.tier.delete(victim)
                self.ledger.evicted(reservation, victim)
                self.count(evictions=1)
            with self.asked():
                self.tier.put(key, block)
        except TierError as exc:
            self.ledger.abort(reservation)
            return exc.reason
        except BaseException:
            self.ledger.abort(reservation)
            raise
        self.ledger.commit(reservation, protected=protected)
        self.count(bytes_written=block.nbytes)
        return None

    def stats(self) -> TierStats:
        with self._lock:
            counts = Counter(self._counts)
        return TierStats(
            name=self.name,
            durable=self.durable,
            healthy=self._health.healthy,
            nbytes=self.ledger.used_nbytes,
            limit_bytes=self.ledger.limit_bytes,
            blocks=len(self.ledger),
            hits=counts["hits"],
            misses=counts["misses"],
            bytes_read=counts["bytes_read"],
            bytes_written=counts["bytes_written"],
            evictions=counts["evictions"],
            damaged=counts["damaged"],
            errors=counts["errors"],
        )

    def _worked(self) -> None:
        if self._health.worked():
            _log.warning("tier %s is back", self.name)

    def _load(self) -> bool:
        """Enter what the tier holds into the books; again later if it is out of service now."""
        try:
            with self.asked():
                held = self.tier.entries()
        except TierError:
            return False
        self.ledger.load((entry.key, entry.nbytes) for entry in held)
        self.loaded()
        self._loaded = True
        return True
