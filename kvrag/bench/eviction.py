"""`kvrag bench eviction`: what eviction policies keep, and what a store of many blocks costs.

Hit rates are those of traces, see `traces.py`. The curve is that of `TieredStore.put` and `open`
over a tier that holds nothing, but says that it holds a number of blocks: what is left is what the
store itself takes of the processor and of memory, half of its blocks being a corpus's.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvrag.bench.curve_plot import plot_curve
from kvrag.bench.frame import median, print_environment, print_json, print_table
from kvrag.bench.items import drawn, load_items
from kvrag.bench.plots import check_plotting
from kvrag.bench.traces import (
    CONTESTANTS,
    Use,
    numbered_key,
    passages_of,
    replay,
    retrieval_trace,
    zipf_trace,
)
from kvrag.engine import Engine
from kvrag.retrieval.embedder import open_embedder
from kvrag.store.block import Block, BlockHeader, encode_block
from kvrag.store.eviction import POLICIES, policy_named
from kvrag.store.keys import BlockKey
from kvrag.store.tier import StoredBlock, Tier, segment_range
from kvrag.store.tiered import TieredStore, TierSlot

__all__ = ["EvictionOptions", "run"]

_FINGERPRINT = "simulated"


@dataclass(frozen=True, slots=True)
class EvictionOptions:
    """`items` and `k` are of retrieval traces, `uses` and `catalog` of the made-up one.

    `shares`: sizes of the tier, as parts of all the bytes of a trace; `blocks`: of the curve.
    """

    items: int = 1000
    k: int = 4
    uses: int = 20_000
    catalog: int = 5000
    shares: tuple[float, ...] = (0.02, 0.1, 0.3)
    blocks: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    operations: int = 2000
    seed: int = 0
    plot: Path | None = None


def run(engine: Engine, data: Sequence[Path], options: EvictionOptions) -> dict[str, Any]:
    """Measure, print, draw, and return what the JSON line holds."""
    if options.plot is not None:
        check_plotting()
    config = engine.model.decoder.config
    itemsize = engine.model.decoder.dtype.itemsize
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    traces = {
        "zipf with scans": zipf_trace(
            options.uses, blocks=options.catalog, bytes_per_token=per_token, seed=options.seed
        )
    }
    for path in data:
        items = drawn(load_items(path, "all"), options.items, options.seed)
        tokens = [len(engine.model.tokenizer.encode(text)) for text in passages_of(items)]
        traces[f"retrieval, {path.stem}"] = retrieval_trace(
            items,
            open_embedder(engine.settings.embedder),
            tokens,
            k=options.k,
            bytes_per_token=per_token,
        )
    rates = {name: _rates(trace, options.shares) for name, trace in traces.items()}
    curve = [point for policy in POLICIES for point in _curve(policy, options)]
    result = {"hit_rates": rates, "curve": curve}
    print_environment()
    rows = [
        (name, f"{share:.0%}", *(f"{by[c]['hits']:.3f} / {by[c]['tokens']:.3f}" for c in by))
        for name, shares in rates.items()
        for share, by in shares.items()
    ]
    columns = ("trace", "tier holds", *CONTESTANTS)
    print_table("Hit rates: share of the uses / of the tokens", columns, rows)
    names = ("put_us", "put_p99_us", "get_us", "get_p99_us", "bytes_per_block")
    print_table(
        "What the store takes beside its tiers, with every put evicting",
        ("policy", "blocks", "put, us", "p99", "get, us", "p99", "bytes a block"),
        [(p["policy"], f"{p['blocks']:,}", *(f"{p[name]:.0f}" for name in names)) for p in curve],
    )
    if options.plot is not None:
        plot_curve(options.plot, curve)
    print_json(result)
    return result


def _rates(trace: Sequence[Use], shares: Sequence[float]) -> dict[float, dict[str, Any]]:
    footprint = sum({use.number: use.nbytes for use in trace}.values())
    found: dict[float, dict[str, Any]] = {}
    for share in shares:
        limit = int(share * footprint)
        found[share] = {}
        for contestant in CONTESTANTS:
            rates = replay(trace, contestant, limit)
            found[share][contestant] = {
                "hits": round(rates.hits, 4),
                "tokens": round(rates.tokens, 4),
            }
    return found


# ---- the curve -----------------------------------------------------------------------------------


class _Simulated(Tier):
    """Says that it holds blocks 0 … `blocks` - 1, all with the same segments, and takes any."""

    name = "simulated"
    durable = True

    def __init__(self, block: Block, blocks: int) -> None:
        self._block, self._blocks = block, blocks

    def header(self, key: BlockKey) -> BlockHeader:
        return replace(self._block.header, key=key)

    def segments(self, key: BlockKey, first: int, last: int) -> list[memoryview]:
        segment_range(self._block.header, first, last)
        return list(self._block.segments[first:last])

    def put(self, key: BlockKey, block: Block) -> None:
        pass

    def delete(self, key: BlockKey) -> bool:
        return True

    def contains(self, key: BlockKey) -> bool:
        return True

    def keys(self, tag: str | None = None) -> Iterator[BlockKey]:
        return (numbered_key(number) for number in range(self._blocks))

    def entries(self) -> list[StoredBlock]:
        # A few at a time would be enough for the store; a list of all is gone when it has loaded.
        return [StoredBlock(key, self._block.nbytes) for key in self.keys()]

    @property
    def nbytes(self) -> int:
        return self._blocks * self._block.nbytes

    def close(self) -> None:
        pass


def _curve(policy: str, options: EvictionOptions) -> list[dict[str, Any]]:
    """A point for each number of blocks; their operations take turns, so that they compare."""
    template = _block(numbered_key(0))
    rng = random.Random(options.seed)
    points: list[dict[str, Any]] = []
    got: list[list[float]] = [[] for _ in options.blocks]
    put: list[list[float]] = [[] for _ in options.blocks]
    with ExitStack() as stack:
        stores = []
        for blocks in options.blocks:
            gc.collect()
            tracemalloc.start()
            stores.append(stack.enter_context(_opened(template, blocks, policy)))
            gc.collect()
            nbytes, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            points.append({"policy": policy, "blocks": blocks, "bytes_per_block": nbytes / blocks})
        for number in range(options.operations):
            for place, (blocks, store) in enumerate(zip(options.blocks, stores, strict=True)):
                got[place].append(_timed(_get, store, numbered_key(rng.randrange(1, blocks, 2))))
                new = _block(numbered_key(blocks + number))
                put[place].append(_timed(store.put, new.header.key, new))
    for place, point in enumerate(points):
        for name, taken in (("put", put[place]), ("get", got[place])):
            point[f"{name}_us"] = median(taken) * 1e6
            point[f"{name}_p99_us"] = _quantile(taken, 0.99) * 1e6
    return points


def _opened(template: Block, blocks: int, policy: str) -> TieredStore:
    slot = TierSlot(
        _Simulated(template, blocks), blocks * template.nbytes, policy=policy_named(policy)
    )
    store = TieredStore([slot])
    store.protect(numbered_key(number) for number in range(0, blocks, 2))
    return store


def _get(store: TieredStore, key: BlockKey) -> None:
    reader = store.open(key, fingerprint=_FINGERPRINT, token_ids=(1,))
    if reader is not None:
        with reader:
            reader.read(0, 1)


def _timed(work: Callable[..., Any], *arguments: Any) -> float:
    # The processor's time: nothing here waits, and others' work on the machine is not the store's.
    begun = time.thread_time()
    work(*arguments)
    return time.thread_time() - begun


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def _block(key: BlockKey) -> Block:
    return encode_block(
        key=key,
        kind="chunk",
        fingerprint=_FINGERPRINT,
        token_ids=(1,),
        k_shape=(1, 1, 1, 1),
        v_shape=(1, 1, 1, 1),
        dtype="float32",
        codec="raw",
        codec_version=1,
        codec_digest="",
        segments=[b"kv"],
    )
