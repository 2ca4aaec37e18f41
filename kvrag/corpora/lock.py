"""Who changes or reads a corpus as a whole keeps jobs away from it, and they keep it away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kvrag.errors import CorpusBusyError
from kvrag.home import Home
from kvrag.precompute.lock import Waiting, only_job

__all__ = ["corpus_held", "refused"]


@contextmanager
def corpus_held(home: Home, namespace: str, waiting: Waiting) -> Iterator[None]:
    """Hold what jobs on the corpus hold, of every shard that there ever was.

    waiting: called with who holds it, before this waits; what it raises ends the waiting.
    """
    with ExitStack() as stack:
        for path in home.job_locks(namespace):
            stack.enter_context(only_job(path, waiting))
        yield


def refused(namespace: str) -> Waiting:
    """For `waiting`: nobody waits. Raises CorpusBusyError."""

    def refuse(holder: str) -> None:
        raise CorpusBusyError(
            f"another job ({holder}) works on the corpus {namespace!r}; try again when it is done"
        )

    return refuse
