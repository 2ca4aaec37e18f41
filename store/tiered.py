"""The store: tiers composed, fastest first.

    with TieredStore([TierSlot(RamTier(), 2**30), TierSlot(DiskTier(root), 2**36)]) as store:
        store.put(key, block)
        with store.open(key, fingerprint=…, token_ids=…) as reader:
            reader.read(0, 1)

It owns admission, promotion, writing back, eviction, expiry, shared loading, pins and counters. A
tier that fails is logged, counted and bypassed, and comes back when it recovers: reading and
writing blocks never raise because of one. It knows nothing of models and prompts.

Call `protect` with what the corpus refers to before anything is put or `shrink` is called: a tier
that starts above its limit evicts at the next admission, or then.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Self

from .errors import StoreError, TierError
from .ledger import Limits
from .loading import Expected, Loading, find
from .placement import Placement, PutOutcome
from .reader import BlockReader
from .slot import Aside, Slot, TierSlot, aside, at_once, recompute_cost
from .stats import StoreStats, TierStats
from .tier import check_key
from .write_back import PAUSES_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .block import Block
    from .health import Clock
    from .keys import BlockKey

__all__ = [
    "Aside",
    "BlockReader",
    "Expected",
    "Limits",
    "PutOutcome",
    "StoreStats",
    "TierSlot",
    "TierStats",
    "TieredStore",
    "aside",
    "at_once",
]

_log = logging.getLogger(__name__)

#: How often a put looks for blocks whose time to live has passed.
_EXPIRY_INTERVAL_S = 1.0
#: Blocks whose deletion is one step: their locks are held as long as a tier takes.
_DELETED_AT_ONCE = 128


class TieredStore:
    """Blocks in several tiers, fastest first. Thread-safe. Closes its tiers.

    `write_back_nbytes`: most bytes of blocks that wait to be written back to a tier; what exceeds
    it is written through. `write_back_pauses_s`: before each further try of one that failed. Raises
    `ValueError` for no tier, or two of one name.
    """

    def __init__(
        self,
        slots: Sequence[TierSlot],
        *,
        write_back_nbytes: int = 2**28,
        write_back_pauses_s: Sequence[float] = PAUSES_S,
        clock: Clock = time.monotonic,
        aside: Aside = aside,
    ) -> None:
        """`aside` runs what nobody waits for, by default in threads of their own: trials of tiers
        that failed, and entering what a tier holds that may be far away.
        """
        names = [place.tier.name for place in slots]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a store needs tiers of different names, got {names}")
        self._placement = Placement(
            [Slot(place, clock=clock, aside=aside) for place in slots],
            write_back_nbytes=write_back_nbytes,
            write_back_pauses_s=write_back_pauses_s,
        )
        self._clock, self._aside = clock, aside
        self._next_expiry_s = clock()
        self._lock = threading.Lock()
        self._loadings: dict[BlockKey, Loading] = {}
        self._open_blocks = 0
        self._closed = False

    def open(
        self,
        key: BlockKey,
        *,
        fingerprint: str,
        token_ids: Sequence[int],
        kind: str = "chunk",
        whole: bool = False,
    ) -> BlockReader | None:
        """A reader of the block, or None for a miss. Close it. See `open_many`."""
        expected = Expected(key, kind, fingerprint, tuple(token_ids))
        return self.open_many([expected], whole=whole)[0]

    def open_many(
        self, wanted: Sequence[Expected], *, whole: bool = False
    ) -> list[BlockReader | None]:
        """A reader of each block, in order, or None for a miss. Close them.

        Each tier is asked for all that the faster ones have not. The header is verified: key, kind,
        fingerprint and token ids. A copy that differs is quarantined like any damaged one, and the
        next tier tried. Who opens a block that is open already shares its segments.

        `whole`: all of each block will be read. Then it may come together with its header, by one
        read, and damage anywhere in it is found now. Raises `StoreError` after `close`, nothing for
        a failing tier.
        """
        loadings: list[Loading | None] = []
        try:
            for expected in wanted:
                self._placement.expire(expected.key)
                loadings.append(self._join(expected))
            find([loading for loading in loadings if loading is not None], whole=whole)
        except BaseException:
            for loading in loadings:
                self._leave(loading)
            raise
        return [self._reader(loading) for loading in loadings]

    def put(
        self, key: BlockKey, block: Block, *, protected: bool = False, durable_only: bool = False
    ) -> PutOutcome:
        """Write the block to every tier that takes it; copies, and replaces one of the key.

        `protected` protects the key, as `protect` does. `durable_only` leaves out the tiers that
        end with the process, and writes back to none: a corpus job must not crowd out what queries
        use, and goes on when a block is durable. A tier that fails, has no room or does not admit
        the block yet is named in the outcome. Raises `ValueError` if the block is of another key,
        `StoreError` after `close`, nothing for a failing tier or a full disk.
        """
        self._check_open()
        check_key(key, block)
        if protected:
            self._placement.protect([key])
        self._expire_some()
        with self._placement.writing.held(key):
            try:
                return self._placement.write_held(key, block, durable_only=durable_only)
            finally:
                self._detach(key)

    def delete(self, key: BlockKey) -> bool:
        """Delete the block from all tiers, open or not; whether one held it.

        Readers keep what they have read. Raises `TierError` after trying all tiers, if one failed:
        it may still hold the block.
        """
        self._check_open()
        with self._placement.writing.held(key):
            try:
                return self._placement.erase_held([key])
            finally:
                self._detach(key)

    def delete_unprotected(self, keys: Sequence[BlockKey]) -> None:
        """Delete those of the blocks that are not protected, each tier asked for all at once.

        Whoever protects one and asks `holds_durably` afterwards is told what is so then. Raises as
        `delete`.
        """
        self._check_open()
        failure: TierError | None = None
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            some = keys[start : start + _DELETED_AT_ONCE]
            with self._placement.writing.all_held(some):
                doomed = [key for key in some if not self._placement.is_protected(key)]
                try:
                    self._placement.erase_held(doomed)
                except TierError as exc:
                    failure = exc
                for key in doomed:
                    self._detach(key)
        if failure is not None:
            raise failure

    def contains(self, key: BlockKey) -> bool:
        """Whether a tier holds something under the key; `open` tells whether it is sound."""
        return self.locate([key])[0] is not None

    def holds_durably(self, key: BlockKey) -> bool:
        """Whether a durable tier that can be asked holds something under the key.

        Waits for a deletion of it that has begun.
        """
        self._check_open()
        with self._placement.writing.held(key):
            return any(
                slot.durable and slot.usable() and slot.contains(key, unknown=False)
                for slot in self._placement.slots
            )

    def locate(self, keys: Sequence[BlockKey]) -> list[str | None]:
        """For each key, in order, the name of the fastest tier that holds it, or None."""
        self._check_open()
        places: list[str | None] = [None] * len(keys)
        for slot in self._placement.slots:
            open_indices = [index for index, place in enumerate(places) if place is None]
            if not open_indices or not slot.usable():
                continue
            try:
                with slot.asked():
                    found = slot.tier.contains_many([keys[index] for index in open_indices])
            except TierError:
                continue
            for index, held in zip(open_indices, found, strict=True):
                if held:
                    places[index] = slot.name
        return places

    def keys(self, tag: str | None = None) -> Iterator[BlockKey]:
        """The keys in any tier, each once, of one namespace tag or of all.

        Raises `TierError` if a tier fails: a list that silently lacks some is worse than none.
        """
        self._check_open()
        seen: set[BlockKey] = set()
        for slot in self._placement.slots:
            with slot.asked():
                seen.update(slot.tier.keys(tag))
        return iter(sorted(seen))

    def protect(self, keys: Iterable[BlockKey]) -> None:
        """Never evict the last durable copy of these blocks, held now or put later."""
        self._placement.protect(keys)

    def unprotect(self, keys: Iterable[BlockKey]) -> None:
        """Undo `protect`."""
        self._placement.unprotect(keys)

    def shrink(self) -> None:
        """Delete, aside, what durable tiers hold beyond their limits, which were lowered perhaps.

        What must stay stays. Others make room when something is put.
        """
        for slot in self._placement.slots:
            if slot.durable:
                try:
                    self._aside(slot.shrink)
                except RuntimeError as exc:  # no thread is to be had: a put will do it
                    _log.warning("tier %s may stay above its limit for now: %s", slot.name, exc)

    def stats(self) -> StoreStats:
        """Counters and sizes of every tier."""
        with self._lock:
            open_blocks = self._open_blocks
        tiers = []
        for slot in self._placement.slots:
            write_back = self._placement.write_backs.get(slot.name)
            blocks, nbytes = (0, 0) if write_back is None else write_back.waiting()
            tiers.append(slot.stats(pending_blocks=blocks, pending_nbytes=nbytes))
        return StoreStats(tuple(tiers), open_blocks)

    def flush(self) -> None:
        """Return when nothing waits to be written back, but for what failed and is tried again."""
        for write_back in self._placement.write_backs.values():
            write_back.flush()

    def close(self) -> None:
        """Write back what waits for durable tiers, and close all. A second call does nothing.

        Readers can read only what they hold.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._loadings.clear()
        write_backs = self._placement.write_backs
        # First what may hang, and is counted on for nothing: the others would wait for it.
        for slot in self._placement.slots:
            if not slot.durable and slot.name in write_backs:
                write_backs[slot.name].close(drop=True)
                slot.close()
        for slot in self._placement.slots:
            if slot.durable and slot.name in write_backs:
                write_backs[slot.name].close()
        for slot in self._placement.slots:
            slot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _expire_some(self) -> None:
        with self._lock:
            if self._clock() < self._next_expiry_s:
                return
            self._next_expiry_s = self._clock() + _EXPIRY_INTERVAL_S
        self._placement.expire_some()

    # -- loadings ------------------------------------------------------------------------------

    def _join(self, expected: Expected) -> Loading | None:
        """The loading of that block, shared if there is one; None if it is one of other tokens."""
        with self._lock:
            if self._closed:
                raise StoreError("the store is closed")
            loading = self._loadings.get(expected.key)
            if loading is None or loading.failed:
                loading = Loading(expected, self._placement, self._promote)
                self._loadings[expected.key] = loading
            elif loading.expected != expected:
                return None
            if not loading.users:
                self._open_blocks += 1
            loading.users += 1
            return loading

    def _reader(self, loading: Loading | None) -> BlockReader | None:
        if loading is None or not loading.found:
            self._leave(loading)
            return None
        key, cost = loading.expected.key, recompute_cost(loading.header)
        for slot in self._placement.slots:
            # In every tier: a block that is hot in memory must not become the oldest on disk.
            if slot.ledger.touch(key, cost=cost):
                slot.tier.touch(key)
        return BlockReader(loading, lambda: self._leave(loading))

    def _leave(self, loading: Loading | None) -> None:
        if loading is None:
            return
        with self._lock:
            loading.users -= 1
            last = not loading.users
            if last:
                self._open_blocks -= 1
                if self._loadings.get(loading.expected.key) is loading:
                    del self._loadings[loading.expected.key]
        if last:
            loading.release()

    def _detach(self, key: BlockKey) -> None:
        """The block was put again or deleted: who opens it now must not share an older loading."""
        with self._lock:
            self._loadings.pop(key, None)

    def _promote(self, loading: Loading, block: Block, source: Slot) -> None:
        key = loading.expected.key
        with self._placement.writing.held(key):
            with self._lock:
                current = self._loadings.get(key) is loading and not self._closed
            if current:
                self._placement.promote_held(key, block, source)

    def _check_open(self) -> None:
        with self._lock:
            if self._closed:
                raise StoreError("the store is closed")
