"""Loading beside compute: what of a prompt's loading does each strategy hide, from which tier?

One prompt runs with its blocks in memory, on disk with and without the page cache, and by halves,
under one codec or several, all interleaved. Blocks are laid where a run wants them before its clock
starts; what storage gives at best is measured in the same turns, by plain reads of the same files.
What the controller foresaw is compared with each run, after some that only teach it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from kvrag.answer import Control
from kvrag.bench.frame import median, show
from kvrag.bench.prompts import Prompts
from kvrag.engine import Engine
from kvrag.errors import InputError
from kvrag.fusion import create
from kvrag.fusion.stream import TierRead
from kvrag.fusion.stream.io_threads import WIDTH
from kvrag.passages import passage_chunks
from kvrag.store.block import Block, encode_header
from kvrag.store.buffers import aligned_buffer
from kvrag.store.residency import cached_share

__all__ = ["PipelineOptions", "run"]

#: In memory; on disk and in the page cache; on disk alone.
Place = Literal["ram", "cached", "cold"]
#: Where each chunk's block lies, by its index and how many there are.
STATES: dict[str, Callable[[int, int], Place]] = {
    "ram": lambda index, count: "ram",
    "disk, cached": lambda index, count: "cached",
    "disk, cold": lambda index, count: "cold",
    "first half ram, then cold": lambda index, count: "ram" if 2 * index < count else "cold",
    "first half cached, then cold": lambda index, count: "cached" if 2 * index < count else "cold",
    "by turns cold and cached": lambda index, count: "cached" if index % 2 else "cold",
}
#: Pages of freshly written files may resist to be dropped for a moment.
_DROPS, _DROP_PAUSE_S = 5, 0.05
_READ_NBYTES = 2**20


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """Chunks a prompt, tokens a chunk, repetitions, and the ratio (None: each strategy's own).

    strategies: names; none are `reuse`, `cacheblend` and what the settings name. warm_up: turns
    before the repetitions, from which the controller learns and nothing else is taken. states: some
    of `STATES`.
    """

    chunks: int = 16
    chunk_tokens: int = 256
    repetitions: int = 5
    ratio: float | None = None
    seed: int = 0
    strategies: tuple[str, ...] = ()
    warm_up: int = 1
    states: tuple[str, ...] = tuple(STATES)

    def __post_init__(self) -> None:
        if unknown := set(self.states) - set(STATES):
            raise InputError(f"no such states: {sorted(unknown)}; there are {list(STATES)}")


def run(engines: Sequence[Engine], options: PipelineOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON).

    Args:
        engines: at least one, alike but for their homes and codecs, of which each has its own.

    Raises:
        InputError: the memory tier is too small for the blocks of one prompt.
    """
    benches = {engine.settings.codec: _Pipeline(engine, options) for engine in engines}
    first, settings = next(iter(benches.values())), engines[0].settings
    names = options.strategies or ("reuse", "cacheblend", settings.strategy)
    cases = list(product(dict.fromkeys(names), options.states, benches))
    runs: dict[tuple[str, str, str], list[_Run]] = {case: [] for case in cases}
    storage: list[float] = []
    rng = random.Random(options.seed)
    for turn in range(options.warm_up + options.repetitions):
        storage.append(first.storage_gb_s())
        for name, state, codec in rng.sample(cases, len(cases)):
            benches[codec].lay(state)
            run = benches[codec].run(name)
            if turn >= options.warm_up:
                runs[name, state, codec].append(run)
    base = settings.codec
    rows = [
        _row(name, state, codec, runs[name, state, codec], runs[name, state, base])
        for name, state, codec in cases
    ]
    result = {
        "benchmark": "pipeline",
        "rows": rows,
        "storage_gb_s": median(storage),
        "context_tokens": first.context_tokens,
        "kv_bytes": {
            codec: sum(block.nbytes for block in bench.blocks) for codec, bench in benches.items()
        },
        "threads": torch.get_num_threads(),
        "io_threads_a_tier": WIDTH,
        "dtype": settings.dtype,
        "repetitions": options.repetitions,
        "model": settings.model,
    }
    columns = (
        "strategy",
        "blocks",
        "codec",
        "TTFT s",
        f"of {base}'s",
        "range",
        "load ms",
        "stall ms",
        "foreseen ms",
        "off by",
        "TTFT off by",
        "hidden",
        "disk GB/s",
    )
    table = [
        (
            row["strategy"],
            row["blocks"],
            row["codec"],
            f"{row['ttft_s']:.3f}",
            f"{row['ttft_ratio']:.2f}",
            f"{row['ttft_range_s'][0]:.3f} - {row['ttft_range_s'][1]:.3f}",
            f"{1000 * row['load_s']:.1f}",
            f"{1000 * row['stall_s']:.1f}",
            _milliseconds(row["predicted_stall_s"]),
            _percent(row["stall_error"]),
            _percent(row["ttft_error"]),
            f"{row['hidden']:.0%}",
            f"{row['gb_s']['disk']:.2f} GB/s" if "disk" in row["gb_s"] else "",
        )
        for row in rows
    ]
    title = f"Loading beside compute, {first.context_tokens} context tokens, plain cold reads "
    show(f"{title}{result['storage_gb_s']:.2f} GB/s", columns, table, result)
    return result


@dataclass(frozen=True, slots=True)
class _Run:
    """What is kept of a run; see `Prefilled`. Not its cache: all runs' would fill the memory."""

    ttft_s: float
    tiers: tuple[str, ...]
    load_s: float
    stall_s: float
    measured: dict[str, TierRead]
    control: Control
    effective_ratio: float


class _Pipeline:
    """One prompt whose blocks are moved between the tiers by what the store offers to all."""

    def __init__(self, engine: Engine, options: PipelineOptions) -> None:
        self._engine, self._options = engine, options
        prompts = Prompts(
            engine.model.tokenizer,
            pool=options.chunks,
            chunk_tokens=options.chunk_tokens,
            seed=options.seed,
        )
        self._prompt = prompts.next(options.chunks)
        self.context_tokens = sum(prompts.tokens(self._prompt.passages))
        self.blocks = [self._computed(passage) for passage in self._prompt.passages]
        needed, limit = sum(block.nbytes for block in self.blocks), engine.settings.ram_bytes
        if needed > limit:
            raise InputError(
                f"the blocks of {options.chunks} chunks take {needed} bytes, ram_bytes is {limit}"
            )

    def lay(self, state: str) -> None:
        """Every block on disk, and where `state` has it too.

        Raises:
            InputError: the page cache of the engine's home cannot be dropped.
        """
        store = self._engine.store
        while store.stats().open_blocks:  # the run before still copies blocks to memory
            time.sleep(0.001)
        places = [STATES[state](index, len(self.blocks)) for index in range(len(self.blocks))]
        for place, block in zip(places, self.blocks, strict=True):
            store.put(block.header.key, block, durable_only=place != "ram")
        files = {path.stem: path for path in self._files()}
        for place, block in zip(places, self.blocks, strict=True):
            if place == "cold":
                _drop(files[block.header.key.digest])

    def run(self, strategy: str) -> _Run:
        begun = time.perf_counter()
        prefilled = self._engine.prefill(
            self._prompt.question,
            passages=self._prompt.passages,
            strategy=create(strategy, self._options.ratio),
            new_tokens=1,
        )
        return _Run(
            time.perf_counter() - begun,
            prefilled.tiers,
            prefilled.load_s,
            prefilled.stall_s,
            prefilled.measured,
            prefilled.control,
            prefilled.effective_ratio,
        )

    def storage_gb_s(self) -> float:
        """What as many plain reads at a time get from the same files without the page cache."""
        self.lay("disk, cold")
        begun = time.perf_counter()
        with ThreadPoolExecutor(WIDTH) as pool:
            nbytes = sum(pool.map(_read_whole, self._files()))
        return nbytes / (time.perf_counter() - begun) / 1e9

    def _computed(self, passage: str) -> Block:
        """The block of a passage, computed and put by the engine, out of its store."""
        engine = self._engine
        held = set(engine.store.keys())
        engine.prefill("?", passages=[passage], strategy="reuse", new_tokens=1)
        (key,) = set(engine.store.keys()) - held
        (chunk,) = passage_chunks([passage], engine.model.tokenizer)
        reader = engine.store.open(
            key, fingerprint=engine.model.fingerprint, token_ids=chunk.token_ids
        )
        if reader is None:
            raise InputError(f"block {key} was computed, but no tier kept it")
        with reader:
            segments = tuple(reader.read(0, len(reader.header.segments)))
            return Block(reader.header, encode_header(reader.header), segments)

    def _files(self) -> list[Path]:
        return sorted((self._engine.settings.home / "kv").rglob("*.kv"))


def _row(
    strategy: str, blocks: str, codec: str, runs: Sequence[_Run], base: Sequence[_Run]
) -> dict[str, Any]:
    """base: the first codec's runs of the same turns."""
    ttft = [one.ttft_s for one in runs]
    tiers = sorted({tier for one in runs for tier in one.measured})
    return {
        "strategy": strategy,
        "blocks": blocks,
        "codec": codec,
        "ttft_s": median(ttft),
        "ttft_ratio": median([a.ttft_s / b.ttft_s for a, b in zip(runs, base, strict=True)]),
        "ttft_range_s": [median([min(ttft)]), median([max(ttft)])],
        "load_s": median([one.load_s for one in runs]),
        "stall_s": median([one.stall_s for one in runs]),
        "predicted_stall_s": _foreseen([one.control.predicted_stall_s for one in runs]),
        "predicted_ttft_s": _foreseen([one.control.predicted_ttft_s for one in runs]),
        "stall_error": _error((one.control.predicted_stall_s, one.stall_s) for one in runs),
        "ttft_error": _error((one.control.predicted_ttft_s, one.ttft_s) for one in runs),
        "hidden": median([_hidden(one) for one in runs]),
        "gb_s": {tier: median(_gb_s(tier, runs)) for tier in tiers},
        "effective_ratio": median([one.effective_ratio for one in runs]),
    }


def _foreseen(seconds: Sequence[float | None]) -> float | None:
    """The median of what the controller foresaw; None while it had measured too little."""
    known = [one for one in seconds if one is not None]
    return median(known) if known else None


def _error(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """The median of |foreseen - measured| / measured."""
    return _foreseen([None if a is None or not b else abs(a - b) / b for a, b in pairs])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _hidden(run: _Run) -> float:
    """Share of loading that took the caller no time."""
    return max(0.0, 1 - run.stall_s / run.load_s) if run.load_s else 1.0


def _gb_s(tier: str, runs: Sequence[_Run]) -> list[float]:
    reads = [one.measured[tier] for one in runs if tier in one.measured]
    return [read.nbytes / read.seconds / 1e9 for read in reads]


def _drop(path: Path) -> None:
    """Take a file out of the page cache, and make sure of that where it can be told."""
    with path.open("rb") as file:
        descriptor = file.fileno()
        for _ in range(_DROPS):
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached_share(descriptor, 0, os.fstat(descriptor).st_size):
                return
            time.sleep(_DROP_PAUSE_S)
    raise InputError(f"{path} stays in the page cache; give a TMPDIR on a disk")


def _read_whole(path: Path) -> int:
    """Read a file in large pieces, as the disk tier does; its size."""
    buffer, done = aligned_buffer(_READ_NBYTES), 0
    with path.open("rb") as file:
        while nbytes := os.preadv(file.fileno(), [buffer], done):
            done += nbytes
    return done
