"""How much of the model's own speed the corpus job keeps.

Each repetition adds documents to a corpus, and gives the same chunks, behind the same prefixes, to
the model alone: one at a time, and with the rows of several joined. The better of the two is the
model's own rate. Repetitions take turns, so that what else the machine does hits all of them; where
it does much, the processor's time tells more than the clock, and counts what overlaps in full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from kvrag.bench.frame import median, show
from kvrag.bench.prompts import Prompts
from kvrag.engine import Engine
from kvrag.generation.kv_cache import KVCache
from kvrag.generation.prefix_cache import PrefixCache
from kvrag.models.decoder import Decoder
from kvrag.models.forward import append
from kvrag.retrieval.chunking import render_chunk
from kvrag.retrieval.documents import Document

__all__ = ["PrecomputeOptions", "run"]

T = TypeVar("T")

#: Of the model's own rate, what the job has to keep.
_AT_LEAST = 0.9


@dataclass(frozen=True, slots=True)
class PrecomputeOptions:
    """Documents a repetition, tokens of each, chunks whose rows are joined, repetitions, seed."""

    documents: int = 8
    tokens: int = 240
    joined: int = 4
    repetitions: int = 5
    seed: int = 0


def run(engine: Engine, options: PrecomputeOptions) -> dict[str, Any]:
    """Measure in the engine's (empty) home, print and return the result (the last line's JSON)."""
    pool = options.documents * (options.repetitions + 1)
    prompts = Prompts(
        engine.model.tokenizer, pool=pool, chunk_tokens=options.tokens, seed=options.seed
    )
    prefixes = PrefixCache(engine.model.decoder)
    taken: dict[str, list[float]] = {"job": [], "alone": [], "joined": []}
    cpu: dict[str, list[float]] = {name: [] for name in taken}
    busy: list[float] = []
    for repetition in range(options.repetitions + 1):
        first = repetition * options.documents
        texts = prompts.pool[first : first + options.documents]
        done, job = _timed(partial(engine.add, [Document(text) for text in texts]))
        chunks = _chunks(engine, texts)
        _, alone = _timed(partial(_alone, engine.model.decoder, prefixes, chunks))
        _, joined = _timed(partial(_joined, engine.model.decoder, prefixes, chunks, options.joined))
        if repetition:  # the first opens and computes what the others find
            for name, (seconds, cpu_s) in (("job", job), ("alone", alone), ("joined", joined)):
                taken[name].append(done.tokens_computed / seconds)
                cpu[name].append(done.tokens_computed / cpu_s)
            busy.append(done.busy)
    shares, cpu_shares = _shares(taken), _shares(cpu)
    result = {
        "benchmark": "precompute",
        "documents": options.documents,
        "tokens": options.tokens,
        "joined": options.joined,
        "repetitions": options.repetitions,
        "tokens_per_s": {name: median(rates) for name, rates in taken.items()},
        "tokens_per_cpu_s": {name: median(rates) for name, rates in cpu.items()},
        "joined_of_alone": median(
            [j / a for j, a in zip(cpu["joined"], cpu["alone"], strict=True)]
        ),
        "job_of_own": median(shares),
        "job_of_own_cpu": median(cpu_shares),
        "busy": median(busy),
        "targets": {
            "job_of_own": {
                "measured": median(shares),
                "at_least": _AT_LEAST,
                "met": median(shares) >= _AT_LEAST,
            }
        },
    }
    rows = [
        ("model, a chunk at a time", median(taken["alone"]), median(cpu["alone"]), "", ""),
        (
            f"model, {options.joined} chunks joined",
            median(taken["joined"]),
            median(cpu["joined"]),
            "",
            "",
        ),
        (
            "the job, from text to disk",
            median(taken["job"]),
            median(cpu["job"]),
            median(shares),
            median(cpu_shares),
        ),
    ]
    columns = ("what", "tokens/s", "tokens a processor second", "of the model's own", "the same")
    show("Precompute", columns, rows, result)
    return result


#: What a chunk is computed behind, and its ids; in the order of the job.
_Behind = tuple[tuple[int, ...], tuple[int, ...]]


def _chunks(engine: Engine, texts: Sequence[str]) -> list[_Behind]:
    """Every block that the job made for these documents."""
    tokenizer, prefixes = engine.model.tokenizer, engine.corpus_prefixes
    return [
        (prefix_ids, tuple(tokenizer.encode(render_chunk("", text))))
        for text in texts
        for prefix_ids in dict.fromkeys(prefixes)
    ]


def _shares(rates: dict[str, list[float]]) -> list[float]:
    """For each repetition, the job's rate of the better of the model's."""
    return [
        job / max(alone, joined)
        for job, alone, joined in zip(rates["job"], rates["alone"], rates["joined"], strict=True)
    ]


def _timed(work: Callable[[], T]) -> tuple[T, tuple[float, float]]:
    """What `work` gives, with seconds of the clock, and of the processor in all threads."""
    begun, cpu_begun = time.perf_counter(), time.process_time()
    given = work()
    return given, (time.perf_counter() - begun, time.process_time() - cpu_begun)


def _alone(decoder: Decoder, prefixes: PrefixCache, chunks: Sequence[_Behind]) -> None:
    for prefix_ids, token_ids in chunks:
        append(decoder, token_ids, _behind(decoder, prefixes, prefix_ids, len(token_ids)))


def _joined(
    decoder: Decoder, prefixes: PrefixCache, chunks: Sequence[_Behind], together: int
) -> None:
    by_length = sorted(chunks, key=lambda chunk: (len(chunk[0]), len(chunk[1])))
    for first in range(0, len(by_length), together):
        _join(decoder, prefixes, by_length[first : first + together])


@torch.inference_mode()
def _join(decoder: Decoder, prefixes: PrefixCache, chunks: Sequence[_Behind]) -> list[KVCache]:
    """`append` of several chunks: products over all rows, attention for each; their caches."""
    caches = [_behind(decoder, prefixes, ids, len(token_ids)) for ids, token_ids in chunks]
    decoder.reserve(max(len(ids) + len(token_ids) for ids, token_ids in chunks))
    begins = [len(ids) for ids, _ in chunks]
    sizes = [len(token_ids) for _, token_ids in chunks]
    joined = [token_id for _, token_ids in chunks for token_id in token_ids]
    x = decoder.embed(torch.tensor(joined, device=decoder.device))
    for layer in decoder.layers:
        parts = zip(*(torch.split(part, sizes, dim=1) for part in layer.project(x)), strict=True)
        mixed = []
        for cache, begin, size, (q, k, v) in zip(caches, begins, sizes, parts, strict=True):
            into_k, into_v, end = cache.k[layer.index], cache.v[layer.index], begin + size
            layer.put(k, v, into_k, into_v, slice(begin, end))
            if layer is not decoder.layers[-1]:
                positions = torch.arange(begin, end, device=decoder.device)
                mixed.append(layer.attend(q, into_k[:, :end], into_v[:, :end], positions))
        if mixed:
            x = layer.finish(x, torch.cat(mixed))
    return caches


def _behind(
    decoder: Decoder, prefixes: PrefixCache, prefix_ids: Sequence[int], tokens: int
) -> KVCache:
    cache = KVCache(
        decoder.config,
        len(prefix_ids) + tokens,
        dtype=decoder.compute_dtype,
        device=decoder.device,
    )
    prefixes.fill(cache, prefix_ids)
    return cache
