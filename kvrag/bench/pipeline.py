"""Loading beside compute: what of a prompt's loading does each strategy hide, from which tier?

One prompt runs with its blocks in memory, on disk with and without the page cache, and half
and half, all interleaved. Blocks are laid where a run wants them before its clock starts; what
storage gives at best is measured in the same turns, by plain reads of the same files.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvrag.bench.frame import median, show
from kvrag.bench.prompts import Prompts
from kvrag.engine import Engine
from kvrag.errors import InputError
from kvrag.fusion import create
from kvrag.fusion.stream.io_threads import WIDTH
from kvrag.passages import passage_chunks
from kvrag.prefill import Prefilled
from kvrag.store.block import Block, encode_header
from kvrag.store.buffers import aligned_buffer

__all__ = ["PipelineOptions", "run"]

#: Where the blocks lie: name, share of them in memory, and whether the page cache is dropped.
STATES = (
    ("ram", 1.0, False),
    ("disk, cached", 0.0, False),
    ("disk, cold", 0.0, True),
    ("half ram, half cold", 0.5, True),
)
_READ_NBYTES = 2**20


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """Chunks a prompt, tokens a chunk, repetitions, and the ratio (None: each strategy's own)."""

    chunks: int = 16
    chunk_tokens: int = 256
    repetitions: int = 5
    ratio: float | None = None
    seed: int = 0


def run(engine: Engine, options: PipelineOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON).

    Raises:
        InputError: the memory tier is too small for the blocks of one prompt.
    """
    bench = _Pipeline(engine, options)
    names = dict.fromkeys(("reuse", "cacheblend", engine.settings.strategy))
    cases = [(name, *state) for name in names for state in STATES]
    runs: dict[tuple[str, str], list[_Run]] = {case[:2]: [] for case in cases}
    storage: list[float] = []
    rng = random.Random(options.seed)
    for _ in range(options.repetitions):
        storage.append(bench.storage_gb_s())
        for name, state, share, cold in rng.sample(cases, len(cases)):
            bench.lay(share, cold=cold)
            runs[name, state].append(bench.run(name))
    rows = [_row(*case, runs[case]) for case in runs]
    result = {
        "benchmark": "pipeline",
        "rows": rows,
        "storage_gb_s": median(storage),
        "context_tokens": bench.context_tokens,
        "kv_bytes": sum(block.nbytes for block in bench.blocks),
        "threads": torch.get_num_threads(),
        "io_threads_a_tier": WIDTH,
        "dtype": engine.settings.dtype,
        "codec": engine.settings.codec,
        "repetitions": options.repetitions,
        "model": engine.settings.model,
    }
    columns = (
        "strategy",
        "blocks",
        "TTFT s",
        "range",
        "load ms",
        "stall ms",
        "foreseen ms",
        "hidden",
        "disk GB/s",
    )
    table = [
        (
            row["strategy"],
            row["blocks"],
            f"{row['ttft_s']:.3f}",
            f"{row['ttft_range_s'][0]:.3f} - {row['ttft_range_s'][1]:.3f}",
            f"{1000 * row['load_s']:.1f}",
            f"{1000 * row['stall_s']:.1f}",
            _milliseconds(row["predicted_stall_s"]),
            f"{row['hidden']:.0%}",
            f"{row['gb_s']['disk']:.2f} GB/s" if "disk" in row["gb_s"] else "",
        )
        for row in rows
    ]
    title = f"Loading beside compute, {bench.context_tokens} context tokens, plain cold reads "
    show(f"{title}{result['storage_gb_s']:.2f} GB/s", columns, table, result)
    return result


@dataclass(frozen=True, slots=True)
class _Run:
    ttft_s: float
    prefilled: Prefilled


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

    def lay(self, share: float, *, cold: bool) -> None:
        """Every block on disk, and the first ones, a `share` of all, in memory too."""
        store = self._engine.store
        while store.stats().open_blocks:  # the run before still copies blocks to memory
            time.sleep(0.001)
        near = round(share * len(self.blocks))
        for index, block in enumerate(self.blocks):
            store.put(block.header.key, block, durable_only=index >= near)
        if cold:
            self._drop_page_cache()

    def run(self, strategy: str) -> _Run:
        begun = time.perf_counter()
        prefilled = self._engine.prefill(
            self._prompt.question,
            passages=self._prompt.passages,
            strategy=create(strategy, self._options.ratio),
            new_tokens=1,
        )
        return _Run(time.perf_counter() - begun, prefilled)

    def storage_gb_s(self) -> float:
        """What as many plain reads at a time get from the same files without the page cache."""
        self.lay(0.0, cold=True)
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

    def _drop_page_cache(self) -> None:
        for path in self._files():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _row(strategy: str, blocks: str, runs: Sequence[_Run]) -> dict[str, Any]:
    ttft = [one.ttft_s for one in runs]
    filled = [one.prefilled for one in runs]
    tiers = sorted({tier for one in filled for tier in one.measured})
    return {
        "strategy": strategy,
        "blocks": blocks,
        "ttft_s": median(ttft),
        "ttft_range_s": [median([min(ttft)]), median([max(ttft)])],
        "load_s": median([one.load_s for one in filled]),
        "stall_s": median([one.stall_s for one in filled]),
        "predicted_stall_s": _foreseen([one.control.predicted_stall_s for one in filled]),
        "predicted_ttft_s": _foreseen([one.control.predicted_ttft_s for one in filled]),
        "hidden": median([_hidden(one) for one in filled]),
        "gb_s": {tier: median(_gb_s(tier, filled)) for tier in tiers},
        "effective_ratio": median([one.effective_ratio for one in filled]),
    }


def _foreseen(seconds: Sequence[float | None]) -> float | None:
    """The median of what the controller foresaw; None while it had measured too little."""
    known = [one for one in seconds if one is not None]
    return median(known) if known else None


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f}"


def _hidden(filled: Prefilled) -> float:
    """Share of loading that took the caller no time."""
    return max(0.0, 1 - filled.stall_s / filled.load_s) if filled.load_s else 1.0


def _gb_s(tier: str, filled: Sequence[Prefilled]) -> list[float]:
    reads = [one.measured[tier] for one in filled if tier in one.measured]
    return [read.nbytes / read.seconds / 1e9 for read in reads]


def _read_whole(path: Path) -> int:
    """Read a file in large pieces, as the disk tier does; its size."""
    buffer, done = aligned_buffer(_READ_NBYTES), 0
    with path.open("rb") as file:
        while nbytes := os.preadv(file.fileno(), [buffer], done):
            done += nbytes
    return done
