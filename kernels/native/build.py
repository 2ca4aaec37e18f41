"""The shared library of the C sources beside this file: compiled once, kept, checked when found.

A library's name holds two digests: of all that it depends on (sources, flags, OpenMP runtime, and
what the compiler says of itself and of this CPU), and of its own bytes. So a library is never taken
for another's, and a damaged one is noticed before it is loaded and is compiled again. Files appear
under their names whole. The folder must be writable by this user alone, since what lies in it runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import KernelsUnavailableError

__all__ = ["library_path"]

SOURCES = Path(__file__).parent / "src"
#: No -ffast-math: NaN and infinity keep their meaning. sqrt without errno is one instruction.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
)
TIMEOUT_S = 120


def library_path(folder: Path, *, compiler: str, openmp: Path | None) -> Path:
    """The compiled library in `folder`, which is made if it is missing.

    Args:
        compiler: name or path of a C compiler that understands GCC's options.
        openmp: the OpenMP runtime to share with torch; without one everything runs on one thread.

    Raises:
        KernelsUnavailableError: no compiler, a failed compilation, or a folder that cannot be
            written or that others can write.
    """
    command = shutil.which(compiler)
    if command is None:
        raise KernelsUnavailableError(f"there is no C compiler {compiler!r}")
    flags = FLAGS if openmp is None else (*FLAGS, "-fopenmp")
    # Its macros name its version and every feature of this CPU.
    macros = _run([command, *flags, "-dM", "-E", "-"])
    sources = sorted(SOURCES.iterdir())
    parts = (p for source in sources for p in (source.name.encode(), source.read_bytes()))
    name = _digest([macros, " ".join(flags).encode(), str(openmp).encode(), *parts])
    try:
        _make_private(folder)
        for found in folder.glob(f"{name}-*.so"):
            if found.stem == f"{name}-{_digest([found.read_bytes()])}":
                return found
            found.unlink(missing_ok=True)
        return _compiled(folder, name, [command, *flags], sources, openmp)
    except OSError as exc:
        raise KernelsUnavailableError(f"no library can be kept in {folder}: {exc}") from exc


def _compiled(
    folder: Path, name: str, command: Sequence[str], sources: Sequence[Path], openmp: Path | None
) -> Path:
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
        jobs = [
            ([*command, "-c", str(source), "-o", f"{scratch}/{source.stem}.o"])
            for source in sources
            if source.suffix == ".c"
        ]
        _run_together(jobs)
        library = Path(scratch, "library.so")
        # Linked by path and without -fopenmp, which would bring another runtime beside torch's.
        runtime = [] if openmp is None else [str(openmp)]
        _run([command[0], "-shared", "-o", str(library), *(job[-1] for job in jobs), *runtime])
        kept = folder / f"{name}-{_digest([library.read_bytes()])}.so"
        library.replace(kept)
    return kept


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.stat()
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise KernelsUnavailableError(
            f"{folder} must belong to user {os.geteuid()} and be writable by nobody else; it "
            f"belongs to user {stat.st_uid} and has mode {stat.st_mode & 0o777:04o}"
        )


def _run(command: Sequence[str]) -> bytes:
    """Its output."""
    return _run_together([command])[0]


def _run_together(commands: Iterable[Sequence[str]]) -> list[bytes]:
    """Their outputs, once all have succeeded.

    Raises:
        KernelsUnavailableError: one could not start, failed, or took longer than TIMEOUT_S.
    """
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            running.append(  # noqa: PERF401 - those that started must be known if one does not
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        outputs = []
        for process in running:
            out, err = process.communicate(timeout=TIMEOUT_S)
            if process.returncode != 0:
                raise KernelsUnavailableError(
                    f"{process.args!r} failed with status {process.returncode}: "
                    f"{err.decode(errors='replace').strip()[-1000:]}"
                )
            outputs.append(out)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise KernelsUnavailableError(f"the C compiler did not run: {exc}") from exc
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.communicate()
    return outputs


def _digest(parts: Iterable[bytes]) -> str:
    """32 hexadecimal digits; the parts are told apart by their lengths."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
