"""Many machines on one corpus without a word between them: a document's id says whose it is."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from kvrag.errors import InputError

__all__ = ["Shard"]

_DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """The documents of machine `number`, from 1, of `count`.

    Raises InputError for numbers that make no sense.
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(f"shard {self}: give I/N with I from 1 to N")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`I/N`. Raises InputError."""
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()):
            raise InputError(f"shard {text!r}: give I/N, such as 1/4")
        return cls(int(number), int(count))

    def owns(self, document_id: str) -> bool:
        """Whether a document is this machine's. Shards hold about as many."""
        digest = blake2b(document_id.encode(), digest_size=_DIGEST_BYTES).digest()
        return int.from_bytes(digest, "little") % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
