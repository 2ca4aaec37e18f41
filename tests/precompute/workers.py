"""A worker in this process, in the place of a cluster's."""

from __future__ import annotations

from contextlib import closing, contextmanager
from itertools import islice

from kvrag.precompute.worker import Worker

__all__ = ["WorkerHere"]


class WorkerHere:
    """Gives blocks to one real worker, `at_once` together, and its reports to `change`."""

    def __init__(self, at_once=4, change=lambda reports: reports):
        self._at_once, self._change = at_once, change

    @contextmanager
    def opened(self, recipe):
        with closing(Worker(recipe)) as self._worker:
            yield self

    def make(self, wanted, cancelled):
        while some := list(islice(wanted, self._at_once)):
            asked = [(item.chunk_id, item.blocks.scope, item.token_ids) for item in some]
            yield self._change(self._worker.make(asked))
            if cancelled():
                return
