"""Which tiers a block lies in: writing, promotion, quarantine, expiry, and what must stay.

Moves blocks between slots. Knows nothing of readers and requests.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import BlockFormatError, TierError, TierFullError
from .keys import packed, unpacked
from .ledger import Standing
from .locks import KeyLocks
from .maintenance import read_block
from .slot import Refused, Slot, recompute_cost
from .write_back import Pending, WriteBack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .block import Block
    from .header import BlockHeader
    from .keys import BlockKey
    from .ledger import Receipt

__all__ = ["Placement", "PutOutcome"]

_log = logging.getLogger(__name__)

_EXPIRED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class PutOutcome:
    """Where a put block lies now.

    `tiers`: names of the tiers that took it, fastest first. `durable`: one of them outlives the
    process. `pending`: names of those that it will be written back to; `deferred`: of those that
    take it at its second use. `refused`: (name, reason in a sentence) of the others. `lost`: it is
    durable nowhere, and will not be, against the rules: for want of room, or by a failure.
    """

    tiers: tuple[str, ...]
    durable: bool
    refused: tuple[tuple[str, str], ...]
    pending: tuple[str, ...] = ()
    deferred: tuple[str, ...] = ()
    lost: bool = False


class Placement:
    """The slots of a store, fastest first, and the set of protected keys.

    What changes the place of a block, or judges one by looking at it, holds the lock of its key:
    `writing.held(key)`. Methods ending in `_held` expect that of the caller.
    """

    def __init__(
        self, slots: Sequence[Slot], *, write_back_nbytes: int, write_back_pauses_s: Sequence[float]
    ) -> None:
        self.slots = tuple(slots)
        self.writing = KeyLocks()
        #: One for each tier: what one of them waits for is nothing to the others.
        self.write_backs = {
            slot.name: WriteBack(
                self._write_back, most_nbytes=write_back_nbytes, pauses_s=write_back_pauses_s
            )
            for slot in self.slots
            if slot.writes_back
        }
        self._lock = threading.Lock()
        self._protected: set[bytes] = set()
        for slot in self.slots:
            slot.loaded = self._guard_all

    def write_held(self, key: BlockKey, block: Block, *, durable_only: bool) -> PutOutcome:
        """Write the block: durable tiers first, the slowest of them first.

        Those that are written back to come last, when a copy that can wait for them lies in memory.
        `durable_only` spares the memory of this process.
        """
        self._discard(key)
        wanted = [slot for slot in self.slots if not (durable_only and slot.in_process)]
        ordered = [slot for slot in reversed(wanted) if slot.durable]
        ordered += [slot for slot in wanted if not slot.durable]
        later = [slot for slot in ordered if slot.writes_back and not durable_only]
        pending: list[str] = []
        refused: dict[str, Refused] = {}
        for slot in [*(slot for slot in ordered if slot not in later), *later]:
            if slot in later and self._owe(key, block, slot):
                pending.append(slot.name)
                continue
            reason = self._admit(slot, key, block)
            if reason is not None:
                refused[slot.name] = reason
                # What a failing or full tier refuses was told when it began to.
                told = reason.expected or reason.failure
                level = logging.DEBUG if told else logging.WARNING
                _log.log(level, "block %s is not put in tier %s: %s", key, slot.name, reason.reason)
        absent = {*refused, *pending}
        taken = [slot for slot in wanted if slot.name not in absent]
        if taken:
            others = [slot for slot in self.slots if slot not in taken]
            self._drop_older(key, [slot for slot in others if slot.name not in pending])
        wrongly = tuple((name, why.reason) for name, why in refused.items() if not why.expected)
        deferred = tuple(name for name, why in refused.items() if why.expected)
        provided = {slot.name for slot in taken}.union(pending, deferred)
        return PutOutcome(
            tiers=tuple(slot.name for slot in taken),
            durable=any(slot.durable for slot in taken),
            refused=wrongly,
            pending=tuple(pending),
            deferred=deferred,
            lost=bool(wrongly) and not any(s.durable and s.name in provided for s in self.slots),
        )

    def promote_held(self, key: BlockKey, block: Block, source: Slot) -> None:
        """Admit a block read from `source` to the faster tiers, where there is room."""
        for slot in self.slots[: self.slots.index(source)]:
            if key not in slot.ledger:
                self._admit(slot, key, block)

    def expire(self, key: BlockKey) -> None:
        """Delete the block from the tiers in which its time to live has passed, for all we know."""
        if not any(slot.ledger.is_idle(key) for slot in self.slots):
            return
        with self.writing.held(key):
            for slot in self.slots:
                if slot.ledger.is_idle(key):
                    slot.expire(key)

    def expire_some(self) -> None:
        """As `expire`, for some of the blocks that nobody asks for."""
        for slot in self.slots:
            for key in slot.ledger.idle(_EXPIRED_AT_ONCE):
                self.expire(key)

    def is_protected(self, key: BlockKey) -> bool:
        with self._lock:
            return packed(key) in self._protected

    def erase_held(self, keys: Sequence[BlockKey]) -> bool:
        """Delete from every tier, also from durable ones that are bypassed; whether one held any.

        Raises `TierError` after trying all, if one failed: it may still hold some.
        """
        if not keys:
            return False
        for key in keys:
            self._discard(key)
        found = False
        failure: TierError | None = None
        for slot in self.slots:
            try:
                if not slot.durable:
                    slot.require_usable()  # there may be many to wait for
                with slot.asked():
                    found |= any(slot.tier.delete_many(keys))
            except TierError as exc:
                failure = exc
            else:
                for key in keys:
                    slot.ledger.remove(key)
        if failure is not None:
            raise failure
        return found

    def correct(self, slot: Slot, key: BlockKey) -> None:
        """A block in the books was not found in its tier: take it out of them if it is not back."""
        with self.writing.held(key):
            if not slot.contains(key, unknown=True):
                self.forget_held(slot, key)

    def adopt(self, slot: Slot, headers: Sequence[BlockHeader]) -> list[Receipt | None]:
        """Enter and pin blocks found in a tier whose books do not know them.

        A receipt each, or None where there is no room, or no block any more.
        """
        keys = [header.key for header in headers]
        with self.writing.all_held(keys):
            receipts = []
            held = slot.contains_many(keys)
            for header, there in zip(headers, held, strict=True):
                receipt = None
                if there:
                    # It may be one that could not be put here: then there is no room for it.
                    with contextlib.suppress(TierFullError):
                        nbytes, cost = slot.tier.footprint(header), recompute_cost(header)
                        receipt = slot.ledger.adopt(header.key, nbytes, cost=cost)
                        self._guard(header.key)
                receipts.append(receipt)
            return receipts

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
                self._protected.add(packed(key))
            self._guard(key)

    def unprotect(self, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            with self._lock:
                self._protected.discard(packed(key))
            self._guard(key)

    def _admit(self, slot: Slot, key: BlockKey, block: Block) -> Refused | None:
        standing = Standing.PASSING
        if self.is_protected(key):
            standing = Standing.KEPT if slot.durable else Standing.CORPUS
        refused = slot.admit(key, block, standing)
        if refused is None:
            self._guard(key)
        return refused

    def _guard(self, key: BlockKey, *, leaving: Slot | None = None) -> None:
        """Keep the copy in the slowest durable tier that has one; the others compete.

        `leaving` is about to lose its copy: the next one must be kept before.
        """
        name = packed(key)
        with self._lock:
            wanted = name in self._protected
            kept = False
            for slot in reversed(self.slots):
                if slot is leaving:
                    continue
                standing = Standing.CORPUS if wanted else Standing.PASSING
                if wanted and slot.durable and not kept:
                    standing = Standing.KEPT
                held = slot.ledger.stand(key, standing)
                if held is None or standing is not Standing.KEPT:
                    continue
                kept = True
                # The same object as the ledger's: a million of them would be 100 MB more.
                self._protected.discard(name)
                self._protected.add(held)

    # -- writing back ------------------------------------------------------------------------------

    def _owe(self, key: BlockKey, block: Block, target: Slot) -> bool:
        """Queue the write to `target`, if a copy lies in memory and the queue has room."""
        for source in self.slots:
            receipt = source.ledger.pin(key) if source.in_process else None
            if receipt is None:
                continue
            if self.write_backs[target.name].add(
                Pending(key, block.nbytes, source, receipt, target)
            ):
                return True
            source.ledger.unpin(receipt)
        return False

    def _discard(self, key: BlockKey) -> None:
        for write_back in self.write_backs.values():
            write_back.discard(key)

    def _write_back(self, pending: Pending) -> bool:
        """Whether it is worth another try."""
        key, owing = pending.key, self.write_backs[pending.target.name]
        if not pending.target.durable:
            # With the key's lock held, it would let the others wait as long as it hangs.
            for slot in self.slots:
                if slot.durable and slot.name in self.write_backs:
                    self.write_backs[slot.name].settle(key)
        with self.writing.held(key):
            if not owing.is_owed():
                return False
            refused = self._write_from(pending.source, key, pending.target)
            if refused is None or not owing.is_owed():
                return False
            self._drop_older(key, [pending.target])
            level = logging.DEBUG if refused.expected or refused.failure else logging.WARNING
            name, why = pending.target.name, refused.reason
            _log.log(level, "block %s is not written back to tier %s: %s", key, name, why)
            return refused.failure

    def _write_from(self, source: Slot, key: BlockKey, target: Slot) -> Refused | None:
        """Write the copy in one slot to another; None, or why it is not there, which is counted."""
        reason = "its copy in memory is gone"
        try:
            with source.asked():
                block = read_block(source.tier, key)
        except TierError as exc:
            block, reason = None, exc.reason
        except BlockFormatError as exc:
            # A bit that flipped in memory must not be made durable.
            self.quarantine_held(source, key, str(exc))
            block, reason = None, "its copy in memory is damaged"
        if block is None:
            target.count(refused=1)
            return Refused(reason)
        return self._admit(target, key, block)

    def _guard_all(self) -> None:
        with self._lock:
            protected = tuple(self._protected)
        for name in protected:
            self._guard(unpacked(name))

    def _drop_older(self, key: BlockKey, slots: Sequence[Slot]) -> None:
        """A tier that could not take a new version must not answer with the old one.

        Durable copies stay: an older computation of the same block is better than none.
        """
        for slot in slots:
            if slot.durable or key not in slot.ledger or not slot.usable():
                continue
            try:
                with slot.asked():
                    slot.tier.delete(key)
            except TierError:
                continue
            self.forget_held(slot, key)
