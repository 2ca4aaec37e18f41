"""Blocks made by workers that are no threads of this process: what a job asks of them.

The job has noted the reference of each block before it asks for it, looks for the block where it
has to be once a worker reports it, and so needs to trust no worker: a report that does not come,
or of what was not asked for, or that is not true, ends the job. A block made twice is the same
block, so workers may be killed and their work given to others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrag.errors import KvragError
from kvrag.precompute.making import Effort, StorageFullError, Wanted
from kvrag.store.keys import BlockKey, packed, unpacked

__all__ = ["Elsewhere", "Handed", "Report", "WorkersError"]

#: A folder of the network may hide for as long what another machine wrote there.
_HIDDEN_S = 90.0
_ASK_S = 0.5


class WorkersError(KvragError):
    """Workers could not be had, or did not do what they were asked for; repeating goes on there."""


@dataclass(frozen=True, slots=True)
class Report:
    """Of one block. key: packed. refused: why no durable tier took it, or nothing."""

    key: bytes
    effort: Effort
    refused: str = ""


class Elsewhere(Protocol):
    """Where blocks are made."""

    def make(
        self, wanted: Iterator[Wanted], cancelled: Callable[[], bool]
    ) -> Generator[Sequence[Report], None, None]:
        """One report a block, in any order; fewer if cancelled, which is asked between them.

        Closing it stops what is under way.
        """
        ...


class Handed:
    """Blocks in the hands of workers, each asked for once. For one thread."""

    def __init__(
        self, is_stored: Callable[[BlockKey], bool], *, hidden_s: float = _HIDDEN_S
    ) -> None:
        """`hidden_s`: seconds for which a stored block may not be seen from here."""
        self._is_stored, self._hidden_s = is_stored, hidden_s
        #: Chunks by the packed keys of what is asked for, those that have come included.
        self._asked: dict[bytes, int] = {}
        self._due: set[bytes] = set()
        self._unseen: list[bytes] = []

    def add(self, wanted: Wanted) -> bool:
        """Note that a block is asked for; False if it was before, for an equal chunk."""
        name = packed(wanted.key)
        if name in self._asked:
            return False
        self._asked[name] = wanted.chunk_id
        self._due.add(name)
        return True

    def take(self, report: Report) -> int:
        """The chunk that a reported block was asked for.

        Raises:
            StorageFullError: no durable tier took it.
            WorkersError: it was not asked for, or has come before.
        """
        if report.refused:
            raise StorageFullError(report.refused)
        if report.key not in self._due:
            raise WorkersError(
                f"a worker reports the block {report.key.hex()}, which it was not asked for"
            )
        self._due.remove(report.key)
        if not self._is_stored(unpacked(report.key)):
            self._unseen.append(report.key)
        return self._asked[report.key]

    def check(self) -> None:
        """Raise WorkersError unless all that was asked for has come and is stored."""
        if self._due:
            raise WorkersError(f"workers left {len(self._due)} of {len(self._asked)} blocks undone")
        deadline = time.monotonic() + self._hidden_s
        while self._unseen:
            self._unseen = [name for name in self._unseen if not self._is_stored(unpacked(name))]
            if not self._unseen:
                break
            if time.monotonic() >= deadline:
                raise WorkersError(
                    f"{len(self._unseen)} of {len(self._asked)} blocks that workers stored are not "
                    "in the home: it has to be one folder, which all machines share"
                )
            time.sleep(_ASK_S)
