"""`kvrag bench index`: recall, time, build and memory of each kind of vector index as it grows.

Vectors are passages' embeddings again and again, each time with noise of a stated scale, and
queries are questions' with the like: clusters as dense as nearly equal texts make them. True
neighbours are those of the exact search. How far a search goes is chosen on the even questions, and
the odd ones are reported; beside that stands what an index does as it is.

The compressed index takes exact vectors from memory here, and from the catalog in a corpus. No
language model is opened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvrag.bench.frame import show
from kvrag.bench.index_plot import plot_growth
from kvrag.bench.plots import check_plotting
from kvrag.bench.retrieval import Pool, load_pool, passage_vectors
from kvrag.errors import InputError
from kvrag.retrieval import Embedder, open_embedder
from kvrag.retrieval.errors import needs_extra
from kvrag.retrieval.vectors.base import IndexKind, Matrix, Rows
from kvrag.retrieval.vectors.flat import Flat
from kvrag.retrieval.vectors.hnsw import Hnsw
from kvrag.retrieval.vectors.ivfpq import LEAST_VECTORS, IvfPq

__all__ = ["IndexOptions", "noisy", "run"]

_K = 10
_BATCH = 1 << 15
_EFFORTS: dict[IndexKind, tuple[int, ...]] = {
    "hnsw": (32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096),
    "ivfpq": (4, 8, 16, 32, 64, 128, 256, 512),
}


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """sizes: numbers of vectors, rising; recall: what is to be reached; keep: folder for vectors.

    noise: length of what is added to a vector of length 1, before it is made that long again.

    Raises:
        InputError: sizes that do not rise, or a kind that does not exist.
    """

    sizes: tuple[int, ...] = (10_000, 30_000, 100_000, 300_000, 1_000_000)
    kinds: tuple[IndexKind, ...] = ("flat", "hnsw", "ivfpq")
    noise: float = 0.3
    recall: float = 0.95
    keep: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        """Check sizes and kinds."""
        if not self.sizes or list(self.sizes) != sorted({*self.sizes}) or self.sizes[0] < _K:
            raise InputError(f"sizes are {self.sizes}; they must rise, from {_K} on")
        if unknown := set(self.kinds) - {"flat", *_EFFORTS}:
            raise InputError(f"unknown kind {min(unknown)!r}; allowed are flat, hnsw, ivfpq")


class _Searched(Protocol):
    """A `Structure`, as far as it is asked here."""

    def nearest(self, query: Matrix, k: int, live: None, among: None) -> Rows: ...


def noisy(
    vectors: Matrix, first: int, count: int, noise: float, seed: int
) -> npt.NDArray[np.float32]:
    """Rows `first` … of the endless sequence of `vectors` with noise: `(count, dim)`, length 1.

    first: a multiple of 32,768. What comes before a row has no part in it.
    """
    rng = np.random.default_rng((seed, first))
    width = vectors.shape[1]
    rows = vectors[np.arange(first, first + count) % len(vectors)]
    rows = rows + rng.standard_normal((count, width), dtype=np.float32) * (noise / math.sqrt(width))
    unit: npt.NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def run(folder: Path, embedder_name: str, options: IndexOptions) -> dict[str, Any]:
    """Measure, print, and return what the JSON line holds."""
    if options.plot is not None:
        check_plotting()
    pool = load_pool(folder)
    embedder = open_embedder(embedder_name)
    passages = passage_vectors(pool, embedder, options.keep)
    asked = _questions(pool, embedder, options)
    with needs_extra("faiss", "the vector index"):
        import faiss
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        points = list(_points(faiss, passages, asked, options))
    finally:
        faiss.omp_set_num_threads(threads)
    result = {
        "benchmark": "index",
        "data": folder.name,
        "noise": options.noise,
        "k": _K,
        "questions": len(asked) // 2,
        "points": points,
    }
    columns = (
        "effort", "recall@10", "p50_ms", "p95_ms", "cpu_p50_ms", "build_cpu_s", "bytes_per_vector",
    )  # fmt: skip
    show(
        f"{len(asked) // 2} odd questions; passages of {folder.name} with noise of {options.noise}",
        ("kind", "vectors", "effort chosen", *columns),
        [
            (p["kind"], f"{p['vectors']:,}", p["chosen"], *(p[name] for name in columns))
            for p in points
        ],
        result,
    )
    if options.plot is not None:
        plot_growth(options.plot, points, options.recall)
    return result


def _questions(pool: Pool, embedder: Embedder, options: IndexOptions) -> Matrix:
    path = None
    if options.keep is not None:
        path = options.keep / f"{embedder.fingerprint}-{len(pool.questions)}-questions.npy"
    if path is not None and path.exists():
        vectors: Matrix = np.load(path, allow_pickle=False)
    else:
        vectors = np.stack([embedder.embed_query(question) for question, _ in pool.questions])
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, vectors)
    return noisy(vectors, 0, len(vectors), options.noise, seed=1)


def _points(
    faiss: Any, passages: Matrix, asked: Matrix, options: IndexOptions
) -> Iterator[dict[str, Any]]:
    flat, graph = Flat.empty(faiss, passages.shape[1]), Hnsw.empty(faiss, passages.shape[1])
    cost = {"flat": _Cost(), "hnsw": _Cost()}
    for size in options.sizes:
        for first in range(flat.index.ntotal // _BATCH * _BATCH, size, _BATCH):
            rows = noisy(passages, first, _BATCH, options.noise, seed=0)
            rows = rows[max(0, flat.index.ntotal - first) : size - first]
            with cost["flat"]:
                flat.append(rows)
            if "hnsw" in options.kinds:
                with cost["hnsw"]:
                    graph.append(rows)
        true = [set(_best(flat, flat, query).tolist()) for query in asked]
        if "flat" in options.kinds:
            yield _point(flat, flat, asked, true, "all", 0, cost["flat"])
        if "hnsw" in options.kinds:
            yield from _tuned(graph, flat, asked, true, options, cost["hnsw"])
        if "ivfpq" in options.kinds and size >= LEAST_VECTORS:
            spent = _Cost()
            with spent:
                compressed = IvfPq.trained(faiss, passages.shape[1], _Held(flat))
                for rows in _Held(flat).batches():
                    compressed.append(rows)
            yield from _tuned(compressed, flat, asked, true, options, spent)


def _tuned(
    index: Hnsw | IvfPq,
    flat: Flat,
    asked: Matrix,
    true: Sequence[set[int]],
    options: IndexOptions,
    cost: _Cost,
) -> Iterator[dict[str, Any]]:
    """The index as it is, and with the least effort that reaches the recall on even questions."""
    default = index.effort
    yield _point(index, flat, asked, true, "default", default, cost)
    for effort in _EFFORTS[index.kind]:
        index.effort = effort
        found = [_best(index, flat, query) for query in asked[::2]]
        if _recall(found, true[::2]) >= options.recall:
            break
    yield _point(index, flat, asked, true, "even half", index.effort, cost)
    if isinstance(index, Hnsw):
        index.effort = None  # of its size then


def _point(
    index: Flat | Hnsw | IvfPq,
    flat: Flat,
    asked: Matrix,
    true: Sequence[set[int]],
    chosen: str,
    effort: int,
    cost: _Cost,
) -> dict[str, Any]:
    """Figures of the odd questions."""
    wall, processor, found = [], [], []
    for query in asked[1::2]:
        begun, worked = time.perf_counter(), time.process_time()
        found.append(_best(index, flat, query))
        wall.append(1000 * (time.perf_counter() - begun))
        processor.append(1000 * (time.process_time() - worked))
    count = flat.index.ntotal
    return {
        "kind": index.kind,
        "vectors": count,
        "chosen": chosen,
        "effort": effort,
        "recall@10": round(_recall(found, true[1::2]), 4),
        "p50_ms": round(float(np.percentile(wall, 50)), 3),
        "p95_ms": round(float(np.percentile(wall, 95)), 3),
        "cpu_p50_ms": round(float(np.percentile(processor, 50)), 3),
        "cpu_p95_ms": round(float(np.percentile(processor, 95)), 3),
        "build_s": round(cost.wall_s, 2),
        "build_cpu_s": round(cost.processor_s, 2),
        "bytes_per_vector": round(_written_nbytes(index) / count),
    }


def _best(index: _Searched, flat: Flat, query: Matrix) -> Rows:
    """The best rows by their exact vectors, as `VectorIndex.search` has them."""
    rows = index.nearest(query[None, :], _K, None, None)
    scores = (flat.vectors(rows).astype(np.float64) * query).sum(axis=1)
    best: Rows = rows[np.lexsort((rows, -scores))[:_K]]
    return best


def _recall(found: Sequence[Rows], true: Sequence[set[int]]) -> float:
    shares = [
        len(true_rows & set(rows.tolist())) / len(true_rows)
        for rows, true_rows in zip(found, true, strict=True)
    ]
    return float(np.mean(shares))


class _Held:
    """A `Source` of what a flat index holds."""

    def __init__(self, flat: Flat) -> None:
        self._flat, self.count = flat, int(flat.index.ntotal)

    def sample(self, count: int) -> Matrix:
        rng = np.random.default_rng(0)
        rows = rng.choice(self.count, size=min(count, self.count), replace=False)
        return self._flat.vectors(np.sort(rows))

    def batches(self) -> Iterator[Matrix]:
        for first in range(0, self.count, _BATCH):
            yield self._flat.vectors(np.arange(first, min(first + _BATCH, self.count)))


class _Cost:
    """Seconds that its blocks took together."""

    def __init__(self) -> None:
        self.wall_s = self.processor_s = 0.0

    def __enter__(self) -> None:
        self._begun = (time.perf_counter(), time.process_time())

    def __exit__(self, *exc_info: object) -> None:
        wall, processor = self._begun
        self.wall_s += time.perf_counter() - wall
        self.processor_s += time.process_time() - processor


def _written_nbytes(index: Flat | Hnsw | IvfPq) -> int:
    """Of what a file of it takes, which is what memory holds; without writing one."""
    faiss: Any = import_module("faiss")  # its types know no writers
    written = 0

    def count(piece: bytes) -> None:
        nonlocal written
        written += len(piece)

    faiss.write_index(index.index, faiss.PyCallbackIOWriter(count))
    return written
