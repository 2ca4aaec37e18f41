"""Opening models of transformers: one at a time, in silence, and never from a pickle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["first_pickle", "loading"]

#: transformers puts another method into its class while it loads and takes it out behind that. Two
#: loads at once leave it there: from then on no model of the process has its weights tied.
_LOADING = threading.Lock()


def first_pickle(folder: Path) -> str | None:
    """The name of a file of pickled weights, if there is one: torch.load runs whatever it says."""
    return min((file.name for file in folder.rglob("*.bin")), default=None)


@contextmanager
def loading() -> Iterator[None]:
    """One load of the process at a time, without the progress bars that transformers draws."""
    with _LOADING, _without_progress_bars():
        yield


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws "Loading weights" on stderr and has no argument against it."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
