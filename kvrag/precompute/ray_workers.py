"""Workers on a Ray cluster: wanted blocks are the rows of a dataset, which actors map.

    engine.add(read(["docs"]), workers=RayWorkers("auto", count=8))

Ray gives the rows of an actor that died to another one, which goes on behind the blocks that are
stored. Ray is imported when workers are opened, and not before.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kvrag.errors import InputError, MissingExtraError
from kvrag.precompute.elsewhere import Elsewhere, Report, WorkersError
from kvrag.precompute.making import Effort, Wanted
from kvrag.precompute.worker import Recipe, Worker

__all__ = ["RayWorkers"]

_log = logging.getLogger(__name__)

#: Blocks that a worker is given together, and loses together when it dies.
_AT_ONCE = 8
#: Of them so many wait at a worker, the ones that it makes included.
_IN_FLIGHT = 2
#: How often such blocks are given to another worker: what kills each must not do so for ever.
_RETRIES = 5
#: Of a cluster of our own: nothing but token ids is ever in it.
_OBJECT_STORE_BYTES = 2**27
_LOCAL = "local"


@dataclass(frozen=True, slots=True)
class RayWorkers:
    """Actors of a Ray cluster, each with the model and as many threads as the settings say, or one.

    address: `local` starts Ray on this machine and stops it afterwards; `auto`, or the `host:port`
    of a cluster, joins one. Where this process is in a cluster already, that one is taken, and
    not left. count: None is as many as the cluster's processors have room for.

    Raises InputError for a count below 1.
    """

    address: str = _LOCAL
    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise InputError(f"{self.count} workers; give at least 1")

    @contextmanager
    def opened(self, recipe: Recipe) -> Iterator[Elsewhere]:
        """The workers, for a job.

        Raises:
            MissingExtraError: Ray is not installed.
            WorkersError: there is no cluster at the address, or it cannot be started.
        """
        try:
            ray = importlib.import_module("ray")
            importlib.import_module("ray.data")
        except ImportError as exc:
            raise MissingExtraError("workers need Ray: pip install 'kvrag[ray]'") from exc
        threads = recipe.values["threads"] or 1
        joined = ray.is_initialized()
        if not joined:
            self._join(ray, threads)
        try:
            room = int(ray.cluster_resources().get("CPU", 0)) // threads
            yield _Actors(ray, recipe, self.count or max(1, room), threads)
        finally:
            if not joined:
                ray.shutdown()

    def _join(self, ray: Any, threads: int) -> None:
        options: dict[str, Any] = {}
        if self.address == _LOCAL:
            # Nobody is told of a cluster that lives for one job.
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            options = {
                "num_cpus": None if self.count is None else self.count * threads,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        try:
            ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as exc:  # Ray has no type for it
            ray.shutdown()
            raise WorkersError(f"no Ray cluster at {self.address!r}: {_first_line(exc)}") from exc
        for handler in logging.getLogger("ray.data").handlers:
            if handler.name == "console":  # its plans and states; a file has them, too
                handler.setLevel(logging.ERROR)


class _Actors:
    """What a job hands blocks to."""

    def __init__(self, ray: Any, recipe: Recipe, count: int, threads: int) -> None:
        self._ray, self._recipe, self._count, self._threads = ray, recipe, count, threads

    def make(
        self, wanted: Iterator[Wanted], cancelled: Callable[[], bool]
    ) -> Generator[Sequence[Report], None, None]:
        """See `Elsewhere`. Begins when the last of `wanted` is known.

        Raises:
            WorkersError: a worker could not be opened or failed, or workers died again and again.
        """
        tables = [_table(some) for some in iter(lambda: list(islice(wanted, _AT_ONCE)), [])]
        if not tables or cancelled():
            return
        data = self._ray.data.from_arrow(tables)
        data.context.enable_progress_bars = False
        with warnings.catch_warnings():
            # `max_task_retries` has no other way in, and without it rows that kill each worker
            # would be tried for ever.
            warnings.simplefilter("ignore", self._ray.util.annotations.RayDeprecationWarning)
            made = data.map_batches(
                _Actor,
                fn_constructor_args=(self._recipe,),
                batch_size=None,
                batch_format="pyarrow",
                compute=self._ray.data.ActorPoolStrategy(
                    size=min(self._count, len(tables)), max_tasks_in_flight_per_actor=_IN_FLIGHT
                ),
                num_cpus=self._threads,
                num_gpus=1 if self._recipe.values["device"] == "cuda" else 0,
                max_task_retries=_RETRIES,
            )
        del tables
        results = made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        try:
            with closing(iter(results)) as tables_made:
                for table in tables_made:
                    yield _reports(table)
                    if cancelled():
                        return
        except self._ray.exceptions.RayError as exc:
            raise WorkersError(f"Ray's workers failed: {_first_line(exc)}") from exc


class _Actor:
    """A worker as Ray calls it, once a table. What fails is told in place of the reports.

    Raised, it would be lines of Ray's own code on the terminal, and no more than text in the end.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._worker: Worker | None = None

    def __call__(self, asked: Any) -> Any:
        columns = (asked[name].to_pylist() for name in ("chunk", "scope", "token_ids"))
        failure = ""
        try:
            if self._worker is None:
                self._worker = Worker(self._recipe)
            reports = self._worker.make(list(zip(*columns, strict=True)))
        except Exception as exc:
            _log.exception("these blocks are not made")
            reports, failure = [Report(b"", Effort())], _first_line(exc)
        return _arrow().table(
            {
                "key": [report.key for report in reports],
                "tokens": [report.effort.tokens for report in reports],
                "nbytes": [report.effort.nbytes for report in reports],
                "compute_s": [report.effort.compute_s for report in reports],
                "refused": [report.refused for report in reports],
                "failure": [failure] * len(reports),
            }
        )


def _table(wanted: Sequence[Wanted]) -> Any:
    pa = _arrow()
    return pa.table(
        {
            "chunk": pa.array([item.chunk_id for item in wanted], pa.int64()),
            "scope": pa.array([item.blocks.scope for item in wanted], pa.string()),
            "token_ids": pa.array([item.token_ids for item in wanted], pa.list_(pa.uint32())),
        }
    )


def _reports(table: Any) -> list[Report]:
    """The reports of some blocks, in the time of this process: they came just now.

    Raises WorkersError for what failed.
    """
    rows = table.to_pylist()
    if rows[0]["failure"]:
        raise WorkersError(f"a worker failed: {rows[0]['failure']}")
    now_s = time.perf_counter()
    begun_s = now_s - sum(row["compute_s"] for row in rows)
    reports = []
    for row in rows:
        effort = Effort(row["tokens"], row["nbytes"], row["compute_s"])
        if effort.tokens:
            effort.begun_s = begun_s
        if effort.nbytes:
            effort.ended_s = now_s
        reports.append(Report(row["key"], effort, row["refused"]))
    return reports


def _arrow() -> Any:
    return importlib.import_module("pyarrow")


def _first_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {str(exc).strip().partition(chr(10))[0]}"
