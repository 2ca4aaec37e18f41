"""Where files are: paths, folders, patterns, and the URLs that fsspec knows.

    docs/  notes.jsonl  docs/**/*.md  zip://**::archive.zip  s3://bucket/docs/*.pdf

Other programs' file systems are asked through fsspec, whose plugins the user installs.
"""

from __future__ import annotations

import glob
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import DocumentError, MissingExtraError, needs_extra
from .file import Skipped, reason, shown, without_secrets
from .walk import walk

__all__ = ["Place", "is_gone", "lies_within", "places"]

_URL = re.compile(r"[a-z][a-z0-9+.\-]*(?:://|::)")
#: A file system inside a file: what comes out of it may be many times what went in.
_ARCHIVES = frozenset({"zip", "tar", "libarchive"})
#: More than any text is compressed by; an archive that promises more is a bomb.
_MOST_EXPANSION = 200
_LEAST_EXPANDED = 64 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A file that can be opened. origin: names it for good, also from another working folder."""

    source: str
    origin: str
    name: str
    open: Callable[[], AbstractContextManager[BinaryIO]]


def places(given: Path | str) -> Callable[[set[tuple[int, int]]], Iterator[Place | Skipped]]:
    """The files of one path, pattern or URL, in sorted order; asked for when called.

    The call takes the (device, inode) of local folders that were walked before, and adds to them.

    Raises:
        DocumentError: there is no such path, nothing that matches, or a URL that cannot be read.
        MissingExtraError: a URL, without fsspec or its plugin.
    """
    text = os.fspath(given)
    if isinstance(given, str) and _URL.match(given):
        if not given.startswith("file://"):
            return _remote(given)
        text = given.removeprefix("file://")
    roots = [Path(text)]
    # A broken link does exist: it is skipped later, like any other unreadable file.
    try:
        os.lstat(text)
    except (OSError, ValueError) as exc:
        matches = sorted(glob.glob(text, recursive=True)) if _is_pattern(text) else []
        if not matches:
            what = "nothing matches" if _is_pattern(text) else reason(exc)
            raise DocumentError(f"{shown(Path(text))} cannot be loaded: {what}") from exc
        roots = [Path(match) for match in matches]

    def files(seen: set[tuple[int, int]]) -> Iterator[Place | Skipped]:
        for root in roots:
            for path, problem in walk(root, seen):
                if problem is not None:
                    yield Skipped(shown(path), reason(problem))
                else:
                    yield _local(path)

    return files


def is_gone(origin: str) -> bool:
    """Whether the file of that `Place.origin` is no longer there; False where nobody can tell."""
    if not _URL.match(origin):
        return not os.path.lexists(origin)
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(origin)
        return not system.exists(path)
    except FileNotFoundError:  # the archive itself
        return True
    except Exception:  # as below; without a password, say, it may be there all the same
        return False


def lies_within(origin: str, given: Path | str) -> bool:
    """Whether `places(given)` could have led to that origin; a pattern leads below its folder."""
    text = os.fspath(given)
    if isinstance(given, str) and _URL.match(given) and not given.startswith("file://"):
        inner, separator, outer = without_secrets(text).partition("::")
        if separator:
            return origin.endswith(separator + outer)
        return origin.replace(":///", "://").startswith(_fixed(inner).replace(":///", "://"))
    root = shown(Path(os.path.abspath(_fixed(text.removeprefix("file://")))))
    return origin == root or origin.startswith(root.rstrip("/") + "/")


def _fixed(text: str) -> str:
    """The folder of a pattern: its part before the first that can vary."""
    if not _is_pattern(text) or os.path.lexists(text):
        return text
    parts = text.split("/")
    return "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))]) or "."


def _is_pattern(text: str) -> bool:
    return "\0" not in text and glob.has_magic(text)


def _local(path: Path) -> Place:
    origin = shown(Path(os.path.abspath(path)))
    return Place(shown(path), origin, shown(Path(path.name)), lambda: _open_regular(path))


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe, a socket or a device is refused and never waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DocumentError("not a regular file")
    # Between stat and open the path may have become a pipe, and opening one blocks.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise DocumentError("not a regular file")
    return file


# ---- URLs ----------------------------------------------------------------------------------------


def _remote(url: str) -> Callable[[set[tuple[int, int]]], Iterator[Place | Skipped]]:
    safe = without_secrets(url)
    with needs_extra("fsspec", "reading URLs", extra="documents"):
        import fsspec
    inner, separator, outer = url.partition("::")
    if separator and "://" not in inner:
        inner += "://"
    protocol = inner.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(inner + separator + outer)
        paths = _listed(system, path)
        budget = _Budget(_room(outer)) if protocol in _ARCHIVES else None
    except ImportError as exc:
        raise MissingExtraError(
            f"{safe} needs a plugin of fsspec: {without_secrets(reason(exc))}"
        ) from exc
    except Exception as exc:  # a plugin raises whatever its service raises
        raise DocumentError(f"{safe} cannot be loaded: {without_secrets(reason(exc))}") from exc
    if not paths:
        raise DocumentError(f"{safe} cannot be loaded: there is no such file, and nothing matches")

    def place(path: str) -> Place:
        base = f"{protocol}://{path}" if protocol in _ARCHIVES else system.unstrip_protocol(path)
        source = without_secrets(base + separator + outer)
        name = PurePosixPath(path).name
        return Place(source, source, name, lambda: _open_remote(system, path, budget))

    return lambda seen: map(place, paths)


def _listed(system: Any, path: str) -> list[str]:
    """The files that a path of a file system means, sorted; hidden ones only if named."""
    if glob.has_magic(path) and not system.exists(path):
        # Folders that match are no files of ours: `**` finds what is in them.
        return sorted(found for found in system.glob(path) if not system.isdir(found))
    if path and not system.isdir(path):
        return [path] if system.exists(path) else []
    root = path.rstrip("/")
    return sorted(
        found
        for found in system.find(path)
        if not any(part.startswith(".") for part in found[len(root) :].split("/"))
    )


def _open_remote(system: Any, path: str, budget: _Budget | None) -> BinaryIO:
    try:
        stream: BinaryIO = system.open(path, "rb")
    except OSError:
        raise
    except Exception as exc:  # as above; an encrypted member of an archive is a RuntimeError
        raise DocumentError(reason(exc)) from exc
    if budget is None:
        return stream
    return io.BufferedReader(_Counted(stream, budget))


def _room(archive: str) -> int:
    """Bytes that may come out of an archive."""
    import fsspec

    system, path = fsspec.core.url_to_fs(archive)
    return max(_LEAST_EXPANDED, _MOST_EXPANSION * int(system.size(path) or 0))


class _Budget:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = self.left = nbytes


class _Counted(io.RawIOBase):
    """A member of an archive, as far as the archive's budget goes."""

    def __init__(self, stream: BinaryIO, budget: _Budget) -> None:
        self._stream, self._budget = stream, budget

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def readinto(self, buffer: Any) -> int:
        if self._budget.left <= 0:
            raise DocumentError(
                f"the archive expands to more than {self._budget.nbytes} bytes, as no text does"
            )
        try:
            data = self._stream.read(len(buffer))
        except OSError:
            raise
        except Exception as exc:  # a damaged member: zlib.error, BadZipFile, EOFError
            raise DocumentError(f"it cannot be unpacked: {reason(exc)}") from exc
        self._budget.left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
