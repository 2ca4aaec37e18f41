"""A tier in its place in the store: with its limits, its books, its health and its counters."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .admission import SecondUse
from .errors import BlockFormatError, TierError, TierFullError
from .eviction import Lru, Policy
from .health import Clock, Health
from .keys import NO_BLOCK, BlockKey
from .ledger import Ledger, Limits, Reservation, Standing
from .stats import LatencyCounter, TierStats
from .tier import Tier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .block import Block, BlockHeader

__all__ = ["Aside", "Refused", "Slot", "TierSlot", "aside", "at_once", "recompute_cost"]

_log = logging.getLogger(__name__)

_WRITES = ("through", "back")

Operation = Literal["lookup", "read", "write", "other"]

#: Runs work that nobody waits for.
Aside = Callable[[Callable[[], None]], None]

#: Entries that the books take while nobody else can look into them.
_LOADED_AT_ONCE = 1000


def aside(work: Callable[[], None]) -> None:
    """Run it in a thread of its own. Raises `RuntimeError` if the system gives none."""
    threading.Thread(target=work, name="kvrag-aside", daemon=True).start()


def at_once(work: Callable[[], None]) -> None:
    """Run it here: for who wants to see all that the tiers hold, and has time to wait for it."""
    work()


@dataclass(frozen=True, slots=True)
class TierSlot:
    """A tier, what it may hold, and by which rules.

    `limits`: a number is that of all bytes, None is no limit. `policy`: what is evicted first.
    `admission`: whether a block enters at its first use or at its second; a durable tier takes what
    a corpus refers to at once, always. `write`: `back` lets a put return as soon as memory has the
    block; a thread writes it here, and a crash before that loses it.

    Raises `ValueError` if memory of this process is to be written back to.
    """

    tier: Tier
    limits: Limits | int | None = None
    policy: Policy = field(default_factory=Lru)
    admission: Literal["always", "second-use"] = "always"
    write: Literal["through", "back"] = "through"

    def __post_init__(self) -> None:
        if not isinstance(self.limits, Limits):
            object.__setattr__(self, "limits", Limits(self.limits))
        for name, allowed in (("admission", ("always", "second-use")), ("write", _WRITES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} of {self.tier.name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.write == "back" and self.tier.in_process:
            raise ValueError(f"{self.tier.name} is memory: there is nothing to write back to it")


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a tier did not take a block. `expected`: by its rules, and nothing to warn of.

    `failure`: of the tier, which may recover.
    """

    reason: str
    expected: bool = False
    failure: bool = False


def recompute_cost(header: BlockHeader) -> int:
    """What computing the block again costs, in tokens."""
    return header.k_shape[2]


class Slot:
    """One tier of a store. Knows nothing of the other tiers.

    A tier that failed is left alone, and later tried by work that runs `aside`: a tier that hangs
    makes those wait who were asking it when it began to, and nobody after them.

    The books of a durable tier are filled before it is used: they say what must stay there. A tier
    that may be far away, and is counted on for nothing, is used while its books are filled aside.
    """

    def __init__(self, place: TierSlot, *, clock: Clock, aside: Aside = aside) -> None:
        self.tier = place.tier
        self.name = place.tier.name
        self.durable = place.tier.durable
        self.in_process = place.tier.in_process
        self.writes_back = place.write == "back"
        self.ledger = Ledger(place.limits, policy=place.policy, clock=clock)
        self._second_use = SecondUse() if place.admission == "second-use" else None
        self._health = Health(clock)
        self._aside = aside
        self._counts: Counter[str] = Counter()
        self._latencies = {name: LatencyCounter() for name in ("lookup", "read", "write")}
        self._lock = threading.Lock()
        self._clock = clock
        self._listed_s: float | None = None  # when the books were filled
        self._full = False
        self._closed = False
        self.loaded: Callable[[], None] = lambda: None  # called when the books were filled
        if self.durable or self.in_process:
            self._load()
        elif not self._begin(self._load):
            self._health.failed("other")  # so that a trial does it

    def count(self, **amounts: int) -> None:
        """Add to the counters, which are named as in `TierStats`."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def usable(self) -> bool:
        """Whether to ask the tier at all: not from a failure until a trial has worked.

        Never waits for the tier.
        """
        if self._health.claim_trial() and not self._begin(self._try):
            self._health.end_trial()
        return (self._listed_s is not None or not self.durable) and self._health.healthy

    def require_usable(self) -> None:
        """Raise `TierError` unless it is `usable`."""
        if not self.usable():
            raise TierError(self.name, "it is bypassed after a failure")

    @contextlib.contextmanager
    def asked(self, operation: Operation = "other") -> Iterator[None]:
        """Around every operation of the tier: counts and logs outages, and lets them pass."""
        begun = time.perf_counter()
        try:
            yield
        except TierError as exc:
            if not self._closed:  # else somebody was still at it, and it is no outage
                self._failed(operation, exc)
            raise
        except BlockFormatError:
            self._worked(operation)
            raise
        else:
            self._worked(operation)
        finally:
            if operation != "other":
                self._latencies[operation].add(time.perf_counter() - begun)

    def contains(self, key: BlockKey, *, unknown: bool) -> bool:
        """Whether the tier holds something under the key; `unknown` if it fails."""
        try:
            with self.asked("lookup"):
                return self.tier.contains(key)
        except TierError:
            return unknown

    def contains_many(self, keys: Sequence[BlockKey]) -> list[bool]:
        """`contains` of each, asked for at once; False if the tier fails."""
        try:
            with self.asked("lookup"):
                return self.tier.contains_many(keys)
        except TierError:
            return [False] * len(keys)

    def admit(self, key: BlockKey, block: Block, standing: Standing) -> Refused | None:
        """Make room and write, if the rules let the block in; None, or why it is not here."""
        if not self._lets_in(key, standing):
            return Refused("it is admitted at its second use", expected=True)
        refused = self._write(key, block, standing)
        if refused is not None:
            self.count(refused=1)
        return refused

    def expire(self, key: BlockKey) -> None:
        """Delete a block whose time to live has passed, unless another process used it meanwhile.

        Never raises `TierError`.
        """
        ttl_s = self.ledger.limits.ttl_s
        try:
            self.require_usable()
            with self.asked():
                idle_s = self.tier.idle_s(key)
                if idle_s is not None and ttl_s is not None and idle_s <= ttl_s:
                    self.ledger.touch(key, idle_s=idle_s)
                    return
                self.tier.delete(key)
        except TierError:
            return
        self.ledger.remove(key)
        self.count(expired=1)

    def shrink(self) -> None:
        """Delete what the limits have no room for, but for what must stay. Raises no `TierError`.

        One block after another, so that nobody waits for more than that.
        """
        while not self._closed and (reservation := self.ledger.shed()) is not None:
            try:
                self.require_usable()
                self._evict(reservation)
            except TierError:
                return
            finally:
                self.ledger.abort(reservation)

    def _evict(self, reservation: Reservation) -> None:
        for victim in reservation.victims:
            with self.asked():
                self.tier.delete(victim)
            self.ledger.evicted(reservation, victim)
            self.count(evictions=1)

    def _lets_in(self, key: BlockKey, standing: Standing) -> bool:
        if self._second_use is None or key in self.ledger:
            return True
        needed = self.durable and standing is not Standing.PASSING
        return self._second_use.again(key) or needed

    def _write(self, key: BlockKey, block: Block, standing: Standing) -> Refused | None:
        if not self.usable():
            return Refused("it is bypassed after a failure", failure=True)
        try:
            nbytes = self.tier.footprint(block.header)
        except TierFullError as exc:
            return Refused(exc.reason)  # before room is made: nothing is evicted for it
        cost = recompute_cost(block.header)
        reservation = self.ledger.reserve(key, nbytes, cost=cost, standing=standing)
        if reservation is None:
            return Refused(self.ledger.refusal(key, nbytes))
        try:
            self._evict(reservation)
            with self.asked("write"):
                self.tier.put(key, block)
        except TierError as exc:
            self.ledger.abort(reservation)
            return Refused(exc.reason, failure=True)
        except BaseException:
            self.ledger.abort(reservation)
            raise
        self.ledger.commit(reservation, standing=standing)
        self.count(bytes_written=nbytes)
        return None

    def stats(self, *, pending_blocks: int = 0, pending_nbytes: int = 0) -> TierStats:
        with self._lock:
            counts = Counter(self._counts)
        return TierStats(
            name=self.name,
            durable=self.durable,
            policy=self.ledger.policy.name,
            healthy=self._health.healthy,
            nbytes=self.ledger.used_nbytes,
            limit_bytes=self.ledger.limits.nbytes,
            blocks=len(self.ledger),
            hits=counts["hits"],
            misses=counts["misses"],
            bytes_read=counts["bytes_read"],
            bytes_written=counts["bytes_written"],
            evictions=counts["evictions"],
            expired=counts["expired"],
            refused=counts["refused"],
            damaged=counts["damaged"],
            errors=counts["errors"],
            pending_blocks=pending_blocks,
            pending_nbytes=pending_nbytes,
            lookup_latency=self._latencies["lookup"].read(),
            read_latency=self._latencies["read"].read(),
            write_latency=self._latencies["write"].read(),
            listed_s=self._age_s(),
        )

    def _age_s(self) -> float | None:
        if self.in_process:
            return 0.0  # nobody else puts anything there
        return None if self._listed_s is None else self._clock() - self._listed_s

    def close(self) -> None:
        """Close the tier. A second call does nothing."""
        self._closed = True
        self.tier.close()

    def _failed(self, operation: Operation, exc: TierError) -> None:
        self.count(errors=1)
        if isinstance(exc, TierFullError):
            # It cannot be written, but reading goes on. Told once: each block would be a line.
            with self._lock:
                known, self._full = self._full, True
            if not known:
                _log.warning("%s; until it takes blocks again, what it refuses is counted", exc)
        else:
            pause_s = self._health.failed(operation)
            _log.warning("%s; it is bypassed for %g s", exc, pause_s)

    def _worked(self, operation: Operation) -> None:
        if operation == "write" and self._full:
            self._full = False
            _log.warning("tier %s takes blocks again", self.name)
        if self._health.worked(operation):
            _log.warning("tier %s is back", self.name)

    def _try(self) -> None:
        try:
            self.contains(NO_BLOCK, unknown=False)
        finally:
            self._health.end_trial()
        if self._listed_s is None and self._health.healthy:
            self._load()

    def _begin(self, work: Callable[[], None]) -> bool:
        """Run it aside; False if the system gives no thread for it."""
        try:
            self._aside(work)
        except RuntimeError as exc:
            _log.warning("tier %s cannot be tried: %s", self.name, exc)
            return False
        return True

    def _load(self) -> None:
        """Enter what the tier holds into the books; a later trial does it if it fails now."""
        begun_s = self._clock()
        try:
            with self.asked():
                held = self.tier.entries()
        except TierError:
            # Whatever kind it was: until the books are filled, it is tried.
            self._health.failed("other")
            return
        for start in range(0, len(held), _LOADED_AT_ONCE):
            # What was deleted since it was listed is entered, too: look-ups correct that.
            some = held[start : start + _LOADED_AT_ONCE]
            self.ledger.load((entry.key, entry.nbytes, entry.idle_s) for entry in some)
        self.loaded()
        self._listed_s = begun_s
