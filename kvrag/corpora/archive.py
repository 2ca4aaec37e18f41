"""The file of an exported corpus: a tar of plain members, the last of which has their SHA-256.

    manifest.json                one JSON object, see `kvrag.corpora.manifest`
    rows/000001.jsonl …          documents and their chunks, see `kvrag.corpora.rows`
    blocks/0/00000001.kv …       blocks in the format of docs/block-format.md, by prefix
    SHA256SUMS                   a line for each member, as `sha256sum -c` takes them, and one that
                                 begins with # for all bytes before this member

Members stand in this order, numbered without gaps. There is one file for one content: every byte of
a member's header, of the padding and of the end is known beforehand, so that one changed bit
anywhere is found. A name says what a member is, and is never used as a path. Checksums find
accidents; who makes a file up can make them, too.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from typing_extensions import Buffer

from kvrag.errors import CorpusFileError, InputError

__all__ = ["MANIFEST", "Archive", "ArchiveWriter", "Member", "block_name", "rows_name"]

MANIFEST = "manifest.json"
_SUMS = "SHA256SUMS"
_RECORD = 512
_END = bytes(2 * _RECORD)
_PIECE = 1 << 20
#: A manifest is read whole, and the longest line is a document of 64 MiB in the worst spelling.
_MOST_MANIFEST = 16 << 20
_MOST_LINE = 512 << 20


def rows_name(number: int) -> str:
    return f"rows/{number:06}.jsonl"


def block_name(prefix: int, number: int) -> str:
    return f"blocks/{prefix}/{number:08}.kv"


class ArchiveWriter:
    """Writes members into `file` one behind another, and the checksums behind them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._whole = file, hashlib.sha256()
        self._sums: list[tuple[bytes, str]] = []

    def add(self, name: str, parts: Sequence[Buffer]) -> None:
        """A member of these bytes, joined. Raises OSError."""
        views = [memoryview(part).cast("B") for part in parts]
        digest, size = hashlib.sha256(), sum(map(len, views))
        self._write(_header(name, size))
        for view in views:
            digest.update(view)
            self._write(view)
        self._write(bytes(-size % _RECORD))
        self._sums.append((digest.digest(), name))

    def finish(self) -> None:
        """Write the checksums and the end. Raises OSError."""
        sums = _sums_text(self._sums, self._whole.hexdigest())
        self._write(_header(_SUMS, len(sums)))
        self._write(sums + bytes(-len(sums) % _RECORD) + _END)

    def _write(self, data: Buffer) -> None:
        self._whole.update(data)
        self._file.write(data)


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's `size` bytes lie, and what their SHA-256 was when the file was checked.

    prefix: the number in the name of a block; None for rows.
    """

    offset: int
    size: int
    sha256: bytes
    prefix: int | None


class Archive:
    """An exported corpus that is open for reading. Nothing larger than the file is ever asked of
    memory: sizes are held against it first.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Use `Archive.open`."""
        self._file, self._path = file, path
        self._nbytes = os.fstat(file.fileno()).st_size
        self._at = 0
        self.rows: list[Member] = []
        self.blocks: list[Member] = []
        name, size = self._next_header()
        if name != MANIFEST or size > _MOST_MANIFEST:
            raise CorpusFileError(f"{path} is no exported corpus: it has no manifest")
        self.manifest = self._read(size)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Archive]:
        """Open a file and read its manifest, which is not verified until `check`.

        Raises:
            InputError: there is no such file, or it is no file.
            CorpusFileError: it is no exported corpus.
        """
        try:
            # Not blocking: a pipe in the file's place must not hang us.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise InputError(f"{path} cannot be read: {exc.strerror or exc}") from exc
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{path} is no file")
        with os.fdopen(descriptor, "rb") as file:
            yield cls(file, path)

    def check(self) -> None:
        """Read all of the file once and hold every byte against its checksums.

        Fills `rows` and `blocks`. Raises CorpusFileError for anything but a whole, sound file.
        """
        self._file.seek(0)
        self._at, whole = 0, hashlib.sha256()
        sums: list[tuple[bytes, str]] = []
        while True:
            start = self._at
            before = whole.copy()
            name, size = self._next_header(whole)
            if name == _SUMS:
                self._check_end(_sums_text(sums, before.hexdigest()), size)
                return
            prefix = self._placed(name, first=start == 0)
            offset, digest = self._at, hashlib.sha256()
            for piece in self._pieces(size):
                digest.update(piece)
                whole.update(piece)
            self._padding(size, whole)
            sums.append((digest.digest(), name))
            if name != MANIFEST:
                member = Member(offset, size, digest.digest(), prefix)
                (self.rows if prefix is None else self.blocks).append(member)

    def read(self, member: Member) -> bytes:
        """The bytes of a member. Raises CorpusFileError if they are no longer what was checked."""
        self._file.seek(member.offset)
        data = self._read(member.size)
        if hashlib.sha256(data).digest() != member.sha256:
            raise self._changed()
        return data

    def start(self, member: Member, nbytes: int) -> bytes:
        """The first bytes of a member, at most `nbytes`; not verified again."""
        self._file.seek(member.offset)
        return self._read(min(nbytes, member.size))

    def lines(self) -> Iterator[bytes]:
        """The lines of all rows; nothing else is read meanwhile.

        Raises CorpusFileError as `read`, at the end of a member.
        """
        for member in self.rows:
            self._file.seek(member.offset)
            left, digest = member.size, hashlib.sha256()
            while left:
                line = self._read(min(left, _MOST_LINE), line=True)
                if not line or (not line.endswith(b"\n") and len(line) < left):
                    raise CorpusFileError(f"{self._path}: a row is cut short, or too long")
                left -= len(line)
                digest.update(line)
                yield line
            if digest.digest() != member.sha256:
                raise self._changed()

    def _read(self, nbytes: int, *, line: bool = False) -> bytes:
        try:
            return self._file.readline(nbytes) if line else self._file.read(nbytes)
        except OSError as exc:
            raise CorpusFileError(f"{self._path} cannot be read: {exc.strerror or exc}") from exc

    def _changed(self) -> CorpusFileError:
        return CorpusFileError(f"{self._path} was changed while it was read")

    def _next_header(self, whole: hashlib._Hash | None = None) -> tuple[str, int]:
        """Name and size of the next member, whose bytes are sure to be there."""
        raw = self._read(_RECORD)
        if len(raw) < _RECORD:
            raise self._cut_short()
        try:
            info = tarfile.TarInfo.frombuf(raw, "ascii", "strict")
            sound = info.size >= 0 and _header(info.name, info.size) == raw
        except (tarfile.TarError, ValueError, OverflowError) as exc:
            raise CorpusFileError(
                f"{self._path} is no exported corpus, or is damaged at byte {self._at} ({exc})"
            ) from exc
        if not sound:
            raise CorpusFileError(
                f"{self._path} holds what no exported corpus does, at byte {self._at}"
            )
        if whole is not None:
            whole.update(raw)
        self._at += _RECORD
        if info.size > self._nbytes - self._at:
            raise self._cut_short()
        return info.name, info.size

    def _cut_short(self) -> CorpusFileError:
        return CorpusFileError(
            f"{self._path} is cut short at byte {self._nbytes}; copy or export it again"
        )

    def _placed(self, name: str, *, first: bool) -> int | None:
        """The prefix of a block, None for others. Raises for a member that cannot stand here."""
        if first and name == MANIFEST:
            return None
        if not first and not self.blocks and name == rows_name(len(self.rows) + 1):
            return None
        prefix = name.split("/")[1] if name.startswith("blocks/") else ""
        number = len(self.blocks) + 1
        if not first and prefix in ("0", "1") and name == block_name(int(prefix), number):
            return int(prefix)
        raise CorpusFileError(f"{self._path} holds {name!r:.80} where it cannot stand")

    def _pieces(self, size: int) -> Iterator[bytes]:
        self._at += size
        while size:
            piece = self._read(min(size, _PIECE))
            if not piece:
                raise self._cut_short()
            size -= len(piece)
            yield piece

    def _padding(self, size: int, whole: hashlib._Hash | None = None) -> None:
        padding = self._read(-size % _RECORD)
        if len(padding) < -size % _RECORD:
            raise self._cut_short()
        if padding.strip(b"\0"):
            raise CorpusFileError(f"{self._path} is damaged at byte {self._at}")
        if whole is not None:
            whole.update(padding)
        self._at += len(padding)

    def _check_end(self, expected: bytes, size: int) -> None:
        at, stated = self._at, io.BytesIO()
        if size == len(expected):
            for piece in self._pieces(size):
                stated.write(piece)
        if stated.getvalue() != expected:
            raise CorpusFileError(
                f"{self._path} is damaged: {_differing(stated.getvalue(), expected, at)}"
            )
        self._padding(size)
        if self._read(len(_END) + 1) != _END:
            raise CorpusFileError(f"{self._path} does not end where an exported corpus does")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _sums_text(sums: Sequence[tuple[bytes, str]], whole: str) -> bytes:
    lines = [f"{digest.hex()}  {name}\n" for digest, name in sums]
    return "".join([*lines, f"# {whole} of all bytes before this member\n"]).encode()


def _differing(stated: bytes, expected: bytes, at: int) -> str:
    for one, other in zip(stated.splitlines(), expected.splitlines(), strict=False):
        if one != other:
            name = other.decode("ascii", "replace").split("  ")[-1]
            return f"the checksum of {name!r} does not match"
    return f"the checksums at byte {at} are not those of its members"
