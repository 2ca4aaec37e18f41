"""Which tiers a block lies in: writing through, promotion, quarantine, and what must stay.

Moves blocks between slots. Knows nothing of readers and requests.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import TierError
from .locks import KeyLocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .block import Block
    from .header import BlockHeader
    from .keys import BlockKey
    from .ledger import Receipt
    from .slot import Slot

__all__ = ["Placement", "PutOutcome"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PutOutcome:
    """Where a put block lies now.

    `tiers`: names of the tiers that took it, fastest first. `durable`: one of them outlives the
    process. `refused`: (name, reason in a sentence) of the others.
    """

    tiers: tuple[str, ...]
    durable: bool
    refused: tuple[tuple[str, str], ...]


class Placement:
    """The slots of a store, fastest first, and the set of protected keys.

    What changes the place of a block, or judges one by looking at it, holds the lock of its key:
    `writing.held(key)`. Methods ending in `_held` expect that of the caller.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = tuple(slots)
        self.writing = KeyLocks()
        self._lock = threading.Lock()
        self._protected: set[BlockKey] = set()
        for slot in self.slots:
            slot.loaded = self._guard_all

    def write_held(self, key: BlockKey, block: Block, *, durable_only: bool) -> PutOutcome:
        """Write the block through: durable tiers first, the slowest of them first."""
        refused: dict[str, str] = {}
        durable = [slot for slot in reversed(self.slots) if slot.durable]
        volatile = [slot for slot in self.slots if not slot.durable and not durable_only]
        for slot in [*durable, *volatile]:
            reason = slot.admit(key, block, protected=slot.durable and self._is_protected(key))
            if reason is None:
                self._guard(key)
            else:
                refused[slot.name] = reason
                _log.warning("block %s is not put in tier %s: %s", key, slot.name, reason)
        taken = [s for s in self.slots if s.name not in refused and (s.durable or not durable_only)]
        if taken:
            self._drop_older(key, [slot for slot in self.slots if slot not in taken])
        return PutOutcome(
            tiers=tuple(slot.name for slot in taken),
            durable=any(slot.durable for slot in taken),
            refused=tuple(refused.items()),
        )

    def promote_held(self, key: BlockKey, block: Block, source: Slot) -> None:
        """Admit a block read from `source` to the faster tiers, where there is room."""
        for slot in self.slots[: self.slots.index(source)]:
            if key not in slot.ledger:
                slot.admit(key, block, protected=False)
        self._guard(key)

    def erase_held(self, key: BlockKey) -> bool:
        """Delete from every tier, also from those bypassed; whether one held it.

        Raises `TierError` after trying all, if one failed: it may still hold the block.
        """
        found = False
        failure: TierError | None = None
        for slot in self.slots:
            try:
                with slot.asked():
                    found |= slot.tier.delete(key)
            except TierError as exc:
                failure = exc
            else:
                slot.ledger.remove(key)
        if failure is not None:
            raise failure
        return found

    def correct(self, slot: Slot, key: BlockKey) -> None:
        """A block in the books was not found in its tier: take it out of them if it is not back."""
        with self.writing.held(key):
            if not slot.contains(key, unknown=True):
                self.forget_held(slot, key)

    def adopt(self, slot: Slot, header: BlockHeader) -> Receipt | None:
        """Enter and pin a block found in a tier whose books do not know it, if there is room."""
        key = header.key
        with self.writing.held(key):
            if not slot.contains(key, unknown=False):
                return None
            receipt = slot.ledger.adopt(key, header.nbytes)
            self._guard(key)
            return receipt

    def forget_held(self, slot: Slot, key: BlockKey) -> None:
        """The tier does not hold the block any more: what was its next copy may be the last now."""
        self._guard(key, leaving=slot)
        slot.ledger.remove(key)

    def quarantine_held(self, slot: Slot, key: BlockKey, reason: str) -> None:
        """Take a damaged copy out of its tier. Never raises `TierError`."""
        slot.count(damaged=1)
        _log.warning("block %s in tier %s is damaged: %s", key, slot.name, reason)
        try:
            with slot.asked():
                slot.tier.quarantine(key)
        except TierError:
            return  # it lies there still, and will be found damaged again
        self.forget_held(slot, key)

    def protect(self, keys: Iterable[BlockKey]) -> None:
        """Keep the last durable copy of these blocks from being evicted, now and when put later."""
        for key in keys:
            with self._lock:
                self._protected.add(key)
            self._guard(key)

    def unprotect(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            with self._lock:
                self._protected.discard(key)
            self._guard(key)

    def _is_protected(self, key: BlockKey) -> bool:
        with self._lock:
            return key in self._protected

    def _guard(self, key: BlockKey, *, leaving: Slot | None = None) -> None:
        """Protect the copy in the slowest durable tier that has one; the others compete freely.

        `leaving` is about to lose its copy: the next one must be protected before.
        """
        with self._lock:
            wanted = key in self._protected
            for slot in reversed(self.slots):
                if slot is leaving or not slot.durable:
                    continue
                if wanted and slot.ledger.protect(key):
                    wanted = False
                else:
                    slot.ledger.unprotect(key)

    def _guard_all(self) -> None:
        with self._lock:
            protected = tuple(self._protected)
        for key in protected:
            self._guard(key)

    def _drop_older(self, key: BlockKey, slots: Sequence[Slot]) -> None:
        """A tier that could not take a new version must not answer with the old one.

        Durable copies stay: an older computation of the same block is better than none.
        """
        for slot in slots:
            if slot.durable or key not in slot.ledger:
                continue
            try:
                with slot.asked():
                    slot.tier.delete(key)
            except TierError:
                continue
            self.forget_held(slot, key)
