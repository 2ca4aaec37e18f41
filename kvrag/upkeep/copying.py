"""Copying all blocks of one place to another, byte by byte.

What is there already is left out, so that a copy that was cut short, in whatever way, is taken up
again by running it again. Others may use both places meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from kvrag.config import Settings
from kvrag.errors import SettingsError
from kvrag.home import Home
from kvrag.store.files import create_once
from kvrag.store.maintenance import Copied, copy_blocks
from kvrag.upkeep.place import Place
from kvrag.upkeep.standing import Report, Standing

__all__ = ["Copying", "Warn", "check_same", "copy_place", "copy_secret", "counted"]

#: Called with each block that is left out.
Warn = Callable[[Copied], None]


@dataclass(slots=True)
class Copying:
    """Blocks by what became of them, see `Copied`; `nbytes` were written."""

    outcomes: Counter[str] = field(default_factory=Counter)
    nbytes: int = 0


def copy_place(
    source: Place, target: Place, settings: Settings, *, report: Report, warn: Warn
) -> Copying:
    """Copy all blocks, of all namespaces, as they lie there: sealed ones need no key.

    Between two homes the key secret goes along, without which no block is found.

    Args:
        settings: how a Redis is asked, and whether a disk is waited for.

    Raises:
        SettingsError: the target is a home of another secret or encryption key.
        TierError: a place fails.
    """
    if source.home is not None and target.home is not None:
        check_same(source.home.secret, target.home.secret, "a key secret")
        here, there = source.home.encryption_id, target.home.encryption_id
        check_same(here, there, "an encryption key")
    with ExitStack() as stack:
        one = stack.enter_context(source.open(settings))
        keys = list(one.keys())
        other = stack.enter_context(target.open(settings))
        if source.home is not None and target.home is not None:
            copy_secret(source.home, target.home)
            if here.exists():
                create_once(there, here.read_bytes())
        return counted(copy_blocks(one, other, keys), len(keys), report, warn)


def check_same(here: Path, there: Path, what: str) -> None:
    """Raise SettingsError if a home has a file, and another one than the home copied from."""
    if there.exists() and (not here.exists() or there.read_bytes() != here.read_bytes()):
        raise SettingsError(
            f"{there.parent} has {what} of its own: blocks of {here.parent} would not be found "
            "there"
        )


def copy_secret(source: Home, target: Home) -> None:
    """Give the target the key secret, if it has none."""
    create_once(target.secret, source.secret.read_bytes())


def counted(blocks: Iterable[Copied], total: int, report: Report, warn: Warn) -> Copying:
    """Drive a copy to its end."""
    copying = Copying()
    for done, copied in enumerate(blocks, start=1):
        copying.outcomes[copied.outcome] += 1
        copying.nbytes += copied.nbytes if copied.outcome == "copied" else 0
        if copied.why is not None:
            warn(copied)
        report(Standing("blocks", done, total, f"{copying.outcomes['copied']} copied"))
    return copying
