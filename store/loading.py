"""Reading a block: one loading, shared by all who have the block open.

This is the one place where segments are checked against their checksums.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from .block import Block, BlockHeader, encode_header, verify_segments
from .errors import BlockFormatError, DamagedBlockError, StoreError, TierError
from .maintenance import read_block
from .resident import Resident
from .sealing import is_sealed

if TYPE_CHECKING:
    from .keys import BlockKey
    from .ledger import Receipt
    from .placement import Placement
    from .slot import Slot

__all__ = ["Expected", "Fetched", "Loading", "find"]

_log = logging.getLogger(__name__)

#: What a tier says when it is asked for a header.
_Answer = BlockHeader | BlockFormatError | TierError | None


@dataclass(frozen=True, slots=True)
class Expected:
    """What a block must be for the one who opens it. The address alone is not trusted."""

    key: BlockKey
    kind: str
    fingerprint: str
    token_ids: tuple[int, ...]

    def mismatch(self, header: BlockHeader) -> str | None:
        """What differs, in a sentence, or None."""
        if header.key != self.key:
            return f"it is block {header.key}"
        if header.kind != self.kind:
            return f"its kind is {header.kind}, not {self.kind}"
        if header.fingerprint != self.fingerprint:
            return f"its fingerprint is {header.fingerprint}, not {self.fingerprint}"
        if header.token_ids != self.token_ids:
            return "its token ids are others"
        return None


class Fetched(NamedTuple):
    """What one fetch brought.

    `segments`: read-only, padded, verified. `tier`: name of the tier they are from, and
    `read_nbytes` what this fetch read there: nothing of what was held already. `admit`, if there is
    one, admits the block to the faster tiers: the last missing segment is there. Call it once.
    """

    segments: list[memoryview]
    tier: str
    read_nbytes: int
    admit: Callable[[], None] | None


class Loading:
    """A block on its way in. Each segment is read from a tier once, and held until the end.

    All its segments are of one version: a copy whose header differs from the one found first (the
    block was computed and put again) is passed over. Thread-safe.
    """

    def __init__(
        self,
        expected: Expected,
        placement: Placement,
        promote: Callable[[Loading, Block, Slot], None],
    ) -> None:
        self.expected = expected
        self.users = 0  # kept by the store, under its lock
        self._placement = placement
        self._promote = promote
        self._lock = threading.Lock()
        self._sought = False
        self._header: BlockHeader | None = None
        self._slot: Slot | None = None
        self._receipt: Receipt | None = None
        self._brought: list[memoryview] | None = None  # with the header, verified
        self._held: list[memoryview | None] = []
        self._missing = 0
        self._failure: DamagedBlockError | None = None

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def found(self) -> bool:
        """Whether a tier has it, or had it when it was last looked at."""
        return self._slot is not None

    @property
    def header(self) -> BlockHeader:
        if self._header is None:
            raise StoreError("the block was not found")
        return self._header

    @property
    def tier(self) -> str:
        slot = self._slot
        return slot.name if slot is not None else ""

    @property
    def in_memory(self) -> bool:
        slot = self._slot
        return slot is not None and slot.in_process

    def cached_share(self) -> float | None:
        """See `Tier.cached_share`; of the tier that the block is read from."""
        slot = self._slot
        return None if slot is None else slot.tier.cached_share(self.header)

    def fetch(self, first: int, last: int) -> Fetched:
        """Segments `first` … `last - 1`; runs of those that are not held are one read each."""
        if not 0 <= first < last <= len(self._held):
            raise ValueError(
                f"the block has segments 0 to {len(self._held)}, got the range {first} to {last}"
            )
        held = self._range(first, last)
        if held is not None:  # without waiting for a read of other segments
            return Fetched(held, self.tier, 0, None)
        nbytes = 0
        with self._lock:
            index = first
            while index < last:
                if self._held[index] is not None:
                    index += 1
                    continue
                end = index + 1
                while end < last and self._held[end] is None:
                    end += 1
                nbytes += self._fetch(index, end)
                index = end
            admit = self._admission() if nbytes and not self._missing else None
            segments = [view for view in self._held[first:last] if view is not None]
            return Fetched(segments, self.tier, nbytes, admit)

    def resident(self) -> Resident | None:
        """The block where it lies in this process's memory, if that is the fastest tier's.

        What is wrong there is for `fetch` to judge: who finds a segment damaged asks for that.
        """
        slot, header = self._slot, self.header
        if slot is None or slot is not self._placement.slots[0]:
            return None
        if not slot.in_process:
            return None
        try:
            with slot.asked("read"):
                data = slot.tier.span(self.expected.key, 0, len(header.segments))
        except (TierError, BlockFormatError):
            return None
        # Another version may lie there by now.
        if data is None or len(data) != header.nbytes - header.header_nbytes:
            return None
        return Resident(header, slot.name, data, lambda nbytes: slot.count(bytes_read=nbytes))

    def release(self) -> None:
        """The last handle is closed."""
        with self._lock:
            self._unpin()
            self._brought = None
            self._held = [None] * len(self._held)

    def _range(self, first: int, last: int) -> list[memoryview] | None:
        held = [view for view in self._held[first:last] if view is not None]
        return held if len(held) == last - first else None

    # -- all below with the lock held, I/O included: this is what makes it a single flight --------

    def _admission(self) -> Callable[[], None] | None:
        """What is left to do with a block that is held whole: nothing, if no tier is faster."""
        if self._slot is None or self._slot is self._placement.slots[0]:
            return None
        segments = tuple(view for view in self._held if view is not None)
        whole = Block(self.header, encode_header(self.header), segments)
        return partial(self._promote, self, whole, self._slot)

    def _fetch(self, first: int, last: int) -> int:
        """Read from the present tier, or from the next one that has the same block; bytes read."""
        if self._failure is not None:
            raise self._failure
        if self._brought is not None:
            return self._keep(first, self._brought[first:last])
        name, reason = self.tier, "the block is gone"
        while self._slot is not None:
            slot, name = self._slot, self._slot.name
            try:
                slot.require_usable()  # it may have failed meanwhile, for another block
                with slot.asked("read"):
                    views = slot.tier.segments(self.expected.key, first, last)
                if views is not None:
                    verify_segments(self.header, first, views)
                    return self._keep(first, views)
                self._placement.correct(slot, self.expected.key)
                reason = "the block is gone"
            except TierError as exc:
                reason = exc.reason
            except BlockFormatError as exc:
                reason = str(exc)
                self._judge(slot, reason, read=(first, last))
            self._unpin()
            _seek([self], start=self._placement.slots.index(slot) + 1)
        self._failure = DamagedBlockError(self.expected.key, name, reason)
        raise self._failure

    def _keep(self, first: int, views: list[memoryview]) -> int:
        self._held[first : first + len(views)] = views
        self._missing -= len(views)
        if not self._missing:
            self._brought = None
        nbytes = sum(map(len, views))
        if self._slot is not None:
            self._slot.count(bytes_read=nbytes)
        return nbytes

    def _judge(
        self,
        slot: Slot,
        reason: str,
        *,
        read: tuple[int, int] | None = None,
        whole: bool = False,
    ) -> None:
        """Quarantine a copy found damaged, unless a second look finds it sound.

        It was read without the lock of its key, so another version may have been put in its place
        meanwhile, even the same one again, unseen; else the tier erred once: both are counted.
        `read`: the segments that did not fit a sound header; `whole`: anything of it may not.
        """
        key = self.expected.key
        with self._placement.writing.held(key):
            try:
                with slot.asked():
                    erred = self._is_whole(slot) if whole else self._is_sound(slot, read)
            except TierError:
                return
            except BlockFormatError:
                self._placement.quarantine_held(slot, key, reason)
                return
            if erred:
                slot.count(errors=1)
                _log.warning(
                    "block %s in tier %s: %s, but not when read again", key, slot.name, reason
                )

    def _is_sound(self, slot: Slot, read: tuple[int, int] | None) -> bool:
        """Whether what did not fit does now; not if there is no block any more, or another version.

        Raises `BlockFormatError` for damage.
        """
        header = slot.tier.header(self.expected.key)
        if header is None:
            return False
        mismatch = self.expected.mismatch(header)
        if mismatch is not None:
            raise BlockFormatError(mismatch)
        if read is None or header != self._header:
            return False
        views = slot.tier.segments(self.expected.key, *read) or []
        verify_segments(header, read[0], views)
        return bool(views)

    def _is_whole(self, slot: Slot) -> bool:
        """As `_is_sound`, of all there is."""
        block = read_block(slot.tier, self.expected.key)
        mismatch = None if block is None else self.expected.mismatch(block.header)
        if mismatch is not None:
            raise BlockFormatError(mismatch)
        return block is not None

    def _unpin(self) -> None:
        if self._slot is not None and self._receipt is not None:
            self._slot.ledger.unpin(self._receipt)
        self._receipt = None

    # -- seeking, of which `find` and `_seek` do the part that is common to several ----------------

    def _begin(self) -> None:
        """What is to be read is known now, if anything."""
        if self._header is not None:
            self._held = [None] * len(self._header.segments)
            self._missing = len(self._held)
        self._sought = True

    def _bring(self, slot: Slot) -> _Answer:
        """All of the block, verified as it comes, so that reading has nothing left to do."""
        try:
            slot.require_usable()  # it may have failed meanwhile, for the block before
            with slot.asked("read"):
                found = slot.tier.whole(self.expected.key, _verify)
        except (TierError, BlockFormatError) as exc:
            return exc
        if found is None:
            return None
        header, self._brought = found
        return header

    def _settle(self, slot: Slot, receipt: Receipt | None, answer: _Answer, *, whole: bool) -> bool:
        """Whether the block is read from that tier, which gave this answer when asked for it.

        One that is not in the tier's books, where it has no receipt, has still to be entered.
        """
        header = self._sound(slot, answer, known=receipt is not None, whole=whole)
        if header is not None and self._header in (None, header):
            self._header, self._slot, self._receipt = header, slot, receipt
            return True
        self._brought = None
        if receipt is not None:
            slot.ledger.unpin(receipt)
        return False

    def _sound(
        self, slot: Slot, answer: _Answer, *, known: bool, whole: bool
    ) -> BlockHeader | None:
        if isinstance(answer, TierError):
            return None
        if isinstance(answer, BlockFormatError):
            self._judge(slot, str(answer), whole=whole)
            return None
        if answer is None or is_sealed(answer):
            # A sealed one has no key here that opens it: it is not damaged, but of no use.
            slot.count(misses=1)
            if known:
                self._placement.correct(slot, self.expected.key)
            return None
        mismatch = self.expected.mismatch(answer)
        if mismatch is not None:
            self._judge(slot, mismatch)
            return None
        return answer


def find(loadings: Sequence[Loading], *, whole: bool = False) -> None:
    """Seek the blocks, fastest tier first, those that were not sought before.

    A tier is asked for all at once. `whole`: they will be read to the end, so what a tier that is
    no memory knows of is read at once.
    """
    # Who has sought holds the lock only while it reads, and is not waited for.
    unsought = [loading for loading in loadings if not loading._sought]
    if len(unsought) == 1:
        with unsought[0]._lock:
            _seek_new(unsought, whole=whole)
    elif unsought:
        by_id = {id(loading): loading for loading in unsought}
        with ExitStack() as locks:
            for _, loading in sorted(by_id.items()):  # in one order, for others do the same
                locks.enter_context(loading._lock)
            _seek_new(by_id.values(), whole=whole)
    for loading in loadings:
        if (slot := loading._slot) is not None:
            slot.count(hits=1)


def _seek_new(loadings: Iterable[Loading], *, whole: bool) -> None:
    """With their locks held."""
    left = [loading for loading in loadings if not loading._sought]
    if left:
        try:
            _seek(left, whole=whole)
        except BaseException:
            for loading in left:  # on faster tiers
                loading._unpin()
            raise
    for loading in left:
        loading._begin()


def _seek(left: list[Loading], *, start: int = 0, whole: bool = False) -> None:
    """Settle each on the first tier from `start` on that has the block, or on none.

    With their locks held. There is at least one, and all are of one store.
    """
    slots = left[0]._placement.slots
    for slot in slots[start:]:
        if slot.usable():
            left = _ask(slot, left, whole=whole)
            if not left:
                return
    # Only now: who opens the block meanwhile must not take it for a miss.
    for loading in left:
        loading._slot = None


def _ask(slot: Slot, left: list[Loading], *, whole: bool) -> list[Loading]:
    """Settle on that tier what it has; the others. Whatever is raised, no pin of it is left."""
    pinned = [(loading, slot.ledger.pin(loading.expected.key)) for loading in left]
    try:
        # Of what is not in the books, nobody knows how much it would be.
        bring = whole and not slot.in_process
        asked = [loading for loading, receipt in pinned if receipt is None] if bring else left
        headers = iter(_headers(slot, asked))
        left, unknown = [], []
        for loading, receipt in pinned:
            brought = bring and receipt is not None
            answer = loading._bring(slot) if brought else next(headers)
            if not loading._settle(slot, receipt, answer, whole=brought):
                left.append(loading)
            elif receipt is None:
                unknown.append(loading)
        if unknown:
            placement = unknown[0]._placement
            receipts = placement.adopt(slot, [loading.header for loading in unknown])
            for loading, entered in zip(unknown, receipts, strict=True):
                loading._receipt = entered
    except BaseException:
        for _, receipt in pinned:
            if receipt is not None:
                slot.ledger.unpin(receipt)
        raise
    return left


def _headers(slot: Slot, loadings: Sequence[Loading]) -> Sequence[_Answer]:
    if not loadings:
        return ()
    try:
        with slot.asked("lookup"):
            return slot.tier.headers([loading.expected.key for loading in loadings])
    except TierError as exc:
        return [exc] * len(loadings)


def _verify(header: BlockHeader, first: int, views: Sequence[memoryview]) -> None:
    if not is_sealed(header):  # else it is not for us to judge
        verify_segments(header, first, views)
