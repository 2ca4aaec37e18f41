"""`kvrag bench retrieval`: how well and how fast chunks are found by words, by meaning, by both.

The data is a folder with one `.jsonl` of passages (`title`, `text`) and a `bm25_results.csv` of
questions (`question`, `gold_titles`, `setting`), of which those of the setting "pooled" count. One
passage is one chunk. Beside kvrag's searches stands BM25 as it comes: words neither stemmed nor
weighted by where they are; and, where a cross-encoder is given, `reranked`: `hybrid`, whose first
20 it orders. No language model is opened.
"""

from __future__ import annotations

import csv
import json
import math
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrag.bench.frame import show
from kvrag.bench.intervals import interval, shown
from kvrag.bench.items import Half
from kvrag.errors import InputError
from kvrag.models.hub import found_folder
from kvrag.retrieval import (
    Catalog,
    ChunkInput,
    CrossEncoderReranker,
    Document,
    Embedder,
    Found,
    HybridSearch,
    Reranker,
    VectorIndex,
    open_embedder,
    render_chunk,
)
from kvrag.retrieval.terms import terms

__all__ = ["Pool", "RetrievalOptions", "load_pool", "measures", "passage_vectors", "run"]

_PLAIN = "bm25"
_MODES = ("lexical", "dense", "hybrid")
_K = 10
_NOISE = 0.3


@dataclass(frozen=True, slots=True)
class RetrievalOptions:
    """`chunks`: of the corpus whose latency is measured, 0 for none; `keep`: folder for vectors.

    `cross_encoder`: its folder or hub id; None reranks nothing.
    """

    half: Half = "odd"
    chunks: int = 10_000
    timed: int = 200
    keep: Path | None = None
    mmr: float = 1.0
    cross_encoder: str | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """Passages as (title, text), and questions with the places of their gold passages."""

    passages: list[tuple[str, str]]
    questions: list[tuple[str, frozenset[int]]]


def load_pool(folder: Path) -> Pool:
    """Raises InputError for a folder of another form."""
    try:
        (lines,) = folder.glob("*.jsonl")
        passages = [
            (str(fields["title"]), str(fields["text"]))
            for fields in map(json.loads, lines.read_text(encoding="utf-8").splitlines())
        ]
        place = {title: number for number, (title, _) in enumerate(passages)}
        with (folder / "bm25_results.csv").open(encoding="utf-8", newline="") as file:
            questions = [
                (row["question"], frozenset(place[t] for t in row["gold_titles"].split(" | ")))
                for row in csv.DictReader(file)
                if row["setting"] == "pooled"
            ]
    except OSError as exc:
        raise InputError(f"evaluation data {folder} cannot be read: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError(f"evaluation data {folder} has another form: {exc!r}") from exc
    if not questions:
        raise InputError(f"evaluation data {folder} has no questions of the setting 'pooled'")
    return Pool(passages, questions)


def measures(found: Sequence[int], gold: frozenset[int]) -> dict[str, float]:
    """nDCG, recall and reciprocal rank of the first ten, gains being 0 or 1."""
    hits = [1.0 if place in gold else 0.0 for place in found[:_K]]
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(gold), _K) + 1))
    gained = sum(hit / math.log2(rank + 1) for rank, hit in enumerate(hits, start=1))
    first = next((1 / rank for rank, hit in enumerate(hits, start=1) if hit), 0.0)
    return {"ndcg@10": gained / ideal, "recall@10": sum(hits) / len(gold), "mrr@10": first}


def run(folder: Path, embedder_name: str, options: RetrievalOptions) -> dict[str, Any]:
    """Measure, print, and return what the JSON line holds."""
    pool = load_pool(folder)
    embedder = open_embedder(embedder_name)
    vectors = passage_vectors(pool, embedder, options.keep)
    parity = {"even": (0,), "odd": (1,), "all": (0, 1)}[options.half]
    asked = [q for number, q in enumerate(pool.questions) if number % 2 in parity]
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvrag-bench-")))
        catalog = stack.enter_context(Catalog.open(home / "catalog.sqlite"))
        searched, places = _corpus(home, catalog, "pool", embedder, pool.passages, vectors)
        plain = stack.enter_context(closing(_plain_bm25(pool)))
        reranker = None
        if options.cross_encoder is not None:
            reranker = CrossEncoderReranker(found_folder(options.cross_encoder))
        contestants: dict[str, Callable[[str], list[int]]] = {_PLAIN: lambda q: _asked(plain, q)}
        for name, search in _kinds(searched, catalog, reranker, options.mmr).items():
            contestants[name] = lambda q, search=search: [  # type: ignore[misc]
                places[hit.chunk_id] for hit in search(q)
            ]
        scores = {
            name: [measures(find(question), gold) for question, gold in asked]
            for name, find in contestants.items()
        }
        latency = {}
        if options.chunks:
            passages, more = _grown(pool, vectors, options.chunks)
            large, _ = _corpus(home, catalog, "large", embedder, passages, more)
            searches = _kinds(large, catalog, reranker, mmr=1)
            latency = _latency(searches, embedder, [q for q, _ in asked[: options.timed]])
    return _shown(folder.name, pool, scores, latency, options)


def passage_vectors(pool: Pool, embedder: Embedder, keep: Path | None) -> npt.NDArray[np.float32]:
    """`(passages, dim)`: from `keep` where they were stored before."""
    path = None if keep is None else keep / f"{embedder.fingerprint}-{len(pool.passages)}.npy"
    if path is not None and path.exists():
        stored: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
        return stored
    texts = [render_chunk(title, text) for title, text in pool.passages]
    vectors = embedder.embed_documents(texts)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
    return vectors


def _corpus(
    home: Path,
    catalog: Catalog,
    namespace: str,
    embedder: Embedder,
    passages: Sequence[tuple[str, str]],
    vectors: npt.NDArray[np.float32],
) -> tuple[HybridSearch, dict[int, int]]:
    """A namespace with these passages, and the place of each chunk among them."""
    places = {}
    for place, (title, text) in enumerate(passages):
        document = Document(text, title=title)
        catalog.add_document(
            namespace,
            document,
            [ChunkInput(title, text, [0])],  # ids are for a language model, and none is asked
            tokenizer="none",
            vectors=vectors[place : place + 1],
            embedder=embedder.fingerprint,
        )
        (chunk_id,) = catalog.document_chunks(namespace, document.id)
        places[chunk_id] = place
    path = home / f"{namespace}.faiss"
    index = VectorIndex.open(path, catalog, namespace, embedder.fingerprint, embedder.dim)
    return HybridSearch(catalog, namespace, lambda: (embedder, index)), places


def _kinds(
    searched: HybridSearch, catalog: Catalog, reranker: Reranker | None, mmr: float
) -> dict[str, Callable[[str], list[Found]]]:
    """What is compared, by its name: a question to the best chunks."""
    kinds: dict[str, Callable[[str], list[Found]]] = {
        mode: partial(searched.search, k=_K, mode=mode, mmr=mmr) for mode in _MODES
    }
    if reranker is not None:

        def rerank(question: str, chunk_ids: Sequence[int]) -> list[float | None]:
            chunks = [chunk for chunk in catalog.chunk(chunk_ids) if chunk is not None]
            texts = [render_chunk(chunk.title, chunk.text) for chunk in chunks]
            return [*map(float, reranker.scores(question, texts))]

        kinds["reranked"] = partial(searched.search, k=_K, mode="hybrid", mmr=mmr, rerank=rerank)
    return kinds


def _grown(
    pool: Pool, vectors: npt.NDArray[np.float32], chunks: int
) -> tuple[list[tuple[str, str]], npt.NDArray[np.float32]]:
    """The passages again and again under other titles, their vectors with noise, or fewer."""
    rng = np.random.default_rng(0)
    count = len(pool.passages)
    sources = np.arange(chunks) % count
    passages = [
        (f"{pool.passages[source][0]} {number // count}", pool.passages[source][1])
        for number, source in enumerate(sources)
    ]
    noise = rng.standard_normal((chunks, vectors.shape[1])) * _NOISE / math.sqrt(vectors.shape[1])
    rows = vectors[sources] + noise
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return passages, rows.astype(np.float32)


def _latency(
    searches: Mapping[str, Callable[[str], object]], embedder: Embedder, questions: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Milliseconds a question, all of it, each kind of search in turn; embedding alone beside."""
    kinds: dict[str, Callable[[str], object]] = {"embedding": embedder.embed_query, **searches}
    wall: dict[str, list[float]] = {kind: [] for kind in kinds}
    processor: dict[str, list[float]] = {kind: [] for kind in kinds}
    for find in kinds.values():
        find(questions[0])
    for question in questions:
        for kind, find in kinds.items():
            begun, worked = time.perf_counter(), time.process_time()
            find(question)
            wall[kind].append(1000 * (time.perf_counter() - begun))
            processor[kind].append(1000 * (time.process_time() - worked))
    return {
        kind: {
            "p50_ms": round(statistics.median(wall[kind]), 3),
            "p95_ms": round(float(np.percentile(wall[kind], 95)), 3),
            "cpu_p50_ms": round(statistics.median(processor[kind]), 3),
        }
        for kind in kinds
    }


def _plain_bm25(pool: Pool) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE VIRTUAL TABLE plain USING fts5(text, tokenize = unicode61)")
    rows = ((n, f"{title} {text}") for n, (title, text) in enumerate(pool.passages))
    db.executemany("INSERT INTO plain (rowid, text) VALUES (?, ?)", rows)
    return db


def _asked(db: sqlite3.Connection, question: str) -> list[int]:
    any_of = " OR ".join(f'"{term}"' for term in dict.fromkeys(terms(question)))
    rows = db.execute(
        "SELECT rowid FROM plain WHERE plain MATCH ? ORDER BY rank, rowid LIMIT ?", (any_of, _K)
    )
    return [place for (place,) in rows]


def _shown(
    name: str,
    pool: Pool,
    scores: Mapping[str, Sequence[Mapping[str, float]]],
    latency: Mapping[str, Mapping[str, float]],
    options: RetrievalOptions,
) -> dict[str, Any]:
    count = len(scores[_PLAIN])
    groups = [str(number) for number in range(count)]
    kinds = list(scores[_PLAIN][0])
    means = {
        contestant: {kind: interval([score[kind] for score in of], groups) for kind in kinds}
        for contestant, of in scores.items()
    }
    beyond = {
        other: interval(
            [h["ndcg@10"] - o["ndcg@10"] for h, o in zip(scores["hybrid"], of, strict=True)],
            groups,
        )
        for other, of in scores.items()
        if other != "hybrid"
    }
    result = {
        "benchmark": "retrieval",
        "data": name,
        "half": options.half,
        "questions": count,
        "passages": len(pool.passages),
        "mmr": options.mmr,
        "means": means,
        "hybrid_minus": beyond,
        "latency_chunks": options.chunks,
        "latency": dict(latency),
    }
    rows = list(_rows(means, beyond, latency, kinds))
    show(
        f"{count} questions over {len(pool.passages):,} passages of {name}; latency over "
        f"{options.chunks:,} chunks, embedding included",
        ("search", *kinds, "hybrid is better by", "p50, ms", "p95, ms", "processor, ms"),
        rows,
        result,
    )
    return result


def _rows(
    means: Mapping[str, Mapping[str, dict[str, float]]],
    beyond: Mapping[str, dict[str, float]],
    latency: Mapping[str, Mapping[str, float]],
    kinds: Sequence[str],
) -> Iterator[tuple[object, ...]]:
    columns = ("p50_ms", "p95_ms", "cpu_p50_ms")
    for name in (*means, *(kind for kind in latency if kind not in means)):
        yield (
            name,
            *(shown(means[name][kind]) if name in means else "" for kind in kinds),
            shown(beyond[name]) if name in beyond else "",
            *(latency[name][column] if name in latency else "" for column in columns),
        )
