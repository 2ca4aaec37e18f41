"""`kvrag bench`: one command a benchmark; each prints a table and one JSON line last."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrag.bench import (
    eviction,
    fidelity,
    index,
    kernels,
    layers,
    pipeline,
    precompute,
    retrieval,
    sealing,
    store,
    tenants,
    ttft,
)
from kvrag.bench.peers import PEERS, peer_option
from kvrag.bench.store.peers import STORE_PEERS
from kvrag.config import Settings
from kvrag.engine import Engine
from kvrag.errors import InputError
from kvrag.store.codecs import codec_names

__all__ = ["app"]


class Half(StrEnum):
    """Halves of an evaluation set."""

    even = "even"
    odd = "odd"
    all = "all"


PoolArgument = Annotated[
    str, typer.Argument(help="A folder of the eval_data folder, or any: passages, questions.")
]
PictureOption = Annotated[
    Path | None, typer.Option(help="Folder for a picture (PNG and SVG); needs matplotlib.")
]

app = typer.Typer(
    help="Measure speed and fidelity on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.command("ttft")
def ttft_command(
    context: typer.Context,
    contexts: Annotated[
        list[int] | None,
        typer.Option("--context", min=8, help="Tokens of all chunks; may be repeated; 4096."),
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=8, max=2048, help="Tokens a chunk.")] = 256,
    repetitions: Annotated[int, typer.Option(min=1, help="Prompts that everybody answers.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded a prompt.")] = 16,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated; default {', '.join(ttft.STRATEGIES)}. The one that the "
            "settings name is always measured."
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Recompute ratio; default: each strategy's own."),
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Also measure transformers.")] = True,
    baseline_dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of transformers and peers; default: what we calculate in."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:DTYPE]=PYTHON",
            help=f"Also measure another engine ({', '.join(PEERS)}) in the environment of that "
            "interpreter; may be repeated.",
        ),
    ] = None,
    peer_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for a peer to start, and for each answer.")
    ] = 1800,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for pictures (PNG and SVG); needs matplotlib.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws chunks and questions.")] = 0,
) -> None:
    """Time to first token and decode speed of strategies, transformers and other engines."""
    options = ttft.TtftOptions(
        contexts=tuple(contexts or (4096,)),
        chunk_tokens=chunk_tokens,
        repetitions=repetitions,
        new_tokens=new_tokens,
        strategies=tuple(strategy or ttft.STRATEGIES),
        ratio=ratio,
        baseline=baseline,
        baseline_dtype=baseline_dtype,
        peers=tuple(peer_option(text) for text in peer or ()),
        peer_timeout_s=peer_timeout,
        plot=plot,
        seed=seed,
    )
    with _engine(context) as engine:
        ttft.run(engine, options)


@app.command("fidelity")
def fidelity_command(
    context: typer.Context,
    data: Annotated[
        list[str], typer.Argument(help="Names in the eval_data folder (xquad5), or .jsonl files.")
    ],
    items: Annotated[int, typer.Option(min=2, help="Items drawn from each.")] = 100,
    half: Annotated[Half, typer.Option(help="Which half: tune on even, report odd.")] = Half.odd,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated, with options, and at several ratios: "
            f"cacheblend:ratio=0.05,0.15. Default: {', '.join(fidelity.STRATEGIES)}."
        ),
    ] = None,
    context_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,M,…",
            help="Fill each item's context to so many tokens with passages of other items, once "
            "a number. Default: its own passages alone.",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens compared.")] = 32,
    answers: Annotated[bool, typer.Option(help="Also write answers, for F1.")] = False,
    other_prefix: Annotated[
        str | None,
        typer.Option(help="Compute blocks behind this text instead of the prompt's prefix."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for pictures (PNG and SVG); needs matplotlib.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the items.")] = 0,
) -> None:
    """KL, gold-answer NLL and F1 of strategies against full prefill, on the same items."""
    options = fidelity.FidelityOptions(
        items=items,
        half=half.value,
        strategies=tuple(strategy or fidelity.STRATEGIES),
        context_tokens=_numbers("--context-tokens", context_tokens),
        new_tokens=new_tokens,
        answers=answers,
        other_prefix=other_prefix,
        plot=plot,
        seed=seed,
    )
    with _engine(context) as engine:
        fidelity.run(engine, [_data_path(engine.settings, name) for name in data], options)


@app.command("layers")
def layers_command(
    context: typer.Context,
    data: Annotated[
        list[str], typer.Argument(help="Names in the eval_data folder (xquad5), or .jsonl files.")
    ],
    items: Annotated[int, typer.Option(min=2, help="Items drawn from each.")] = 30,
    half: Annotated[Half, typer.Option(help="Which half: tune on even, report odd.")] = Half.odd,
    new_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens compared.")] = 32,
    seed: Annotated[int, typer.Option(help="Draws the items.")] = 0,
) -> None:
    """How stale stored KV is in each layer, and what mending each kind of layer would bring."""
    options = fidelity.FidelityOptions(items, half.value, new_tokens=new_tokens, seed=seed)
    with _engine(context) as engine:
        for name in data:
            layers.run(engine, _data_path(engine.settings, name), options)


@app.command("pipeline")
def pipeline_command(
    context: typer.Context,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks of the prompt.")] = 16,
    chunk_tokens: Annotated[int, typer.Option(min=8, max=2048, help="Tokens a chunk.")] = 256,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs from each place.")] = 5,
    ratio: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Recompute ratio; default: each strategy's own."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws passages and question.")] = 0,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="May be repeated; default reuse, cacheblend and the settings' own."),
    ] = None,
    warm_up: Annotated[
        int, typer.Option(min=0, help="Runs before, from which the controller learns.")
    ] = 1,
    state: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated; default all: {'; '.join(pipeline.STATES)}."),
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated: {', '.join(codec_names())}. Default: the settings' own."
        ),
    ] = None,
) -> None:
    """How much of loading hides behind computing, with blocks in memory, on disk, and on both."""
    options = pipeline.PipelineOptions(
        chunks=chunks,
        chunk_tokens=chunk_tokens,
        repetitions=repetitions,
        ratio=ratio,
        seed=seed,
        strategies=tuple(strategy or ()),
        warm_up=warm_up,
        states=tuple(state or pipeline.STATES),
    )
    settings = _settings(context)
    codecs = dict.fromkeys(codec or (settings.codec,))
    with ExitStack() as opened:
        engines = [opened.enter_context(_engine(context, codec=name)) for name in codecs]
        pipeline.run(engines, options)


@app.command("kernels")
def kernels_command(
    context: typer.Context,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of the context.")] = 4096,
    chunk_tokens: Annotated[int, typer.Option(min=8, max=2048, help="Tokens a chunk.")] = 256,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of scattered rows.")] = 0.15,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs that the median is of.")] = 5,
) -> None:
    """Every kernel in each implementation, against matrix products alone and a plain copy."""
    options = kernels.KernelOptions(tokens, chunk_tokens, ratio, repetitions)
    with _engine(context) as engine:
        kernels.run(engine, options)


@app.command("eviction")
def eviction_command(
    context: typer.Context,
    data: Annotated[
        list[str] | None,
        typer.Argument(help="Names in the eval_data folder (xquad5), or .jsonl files."),
    ] = None,
    items: Annotated[int, typer.Option(min=2, help="Questions drawn from each.")] = 1000,
    k: Annotated[int, typer.Option(min=1, help="Passages retrieved for each question.")] = 4,
    blocks: Annotated[
        str, typer.Option(metavar="N,M,…", help="Sizes of the store whose own cost is measured.")
    ] = "1000,10000,100000,1000000",
    plot: PictureOption = None,
    seed: Annotated[int, typer.Option(help="Draws items and traces.")] = 0,
) -> None:
    """Hit rates of eviction policies, and what a store of many blocks takes in time and memory."""
    sizes = _numbers("--blocks", blocks)
    if min(sizes) < 2:
        raise InputError(f"--blocks is {blocks!r}; a store of fewer than 2 tells nothing")
    options = eviction.EvictionOptions(items=items, k=k, blocks=sizes, seed=seed, plot=plot)
    with _engine(context) as engine:
        eviction.run(engine, [_data_path(engine.settings, name) for name in data or ()], options)


@app.command("retrieval")
def retrieval_command(
    context: typer.Context,
    data: PoolArgument = "hotpot_pool",
    half: Annotated[Half, typer.Option(help="Which half: tune on even, report odd.")] = Half.odd,
    chunks: Annotated[
        int, typer.Option(min=0, help="Chunks of the corpus that is timed; 0 times nothing.")
    ] = 10_000,
    timed: Annotated[int, typer.Option(min=1, help="Questions that are timed.")] = 200,
    mmr: Annotated[float, typer.Option(min=0, max=1, help="Part of relevance.")] = 1.0,
    rerank: Annotated[
        str | None, typer.Option(help="Cross-encoder's folder or hub id, which reranks.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder where the passages' vectors are kept for next time.")
    ] = None,
) -> None:
    """nDCG, recall and latency of searches by words, by meaning and by both. Opens no model."""
    settings = _settings(context)
    options = retrieval.RetrievalOptions(half.value, chunks, timed, keep, mmr, rerank)
    retrieval.run(_pool_folder(settings, data), settings.embedder, options)


@app.command("index")
def index_command(
    context: typer.Context,
    data: PoolArgument = "hotpot_pool",
    vectors: Annotated[int, typer.Option(min=10, help="Vectors of the largest index.")] = 1_000_000,
    growth: Annotated[
        str | None,
        typer.Option(metavar="N,M,…", help="Sizes on the way; default 10,000, 30,000, 100,000, …"),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="May be repeated; default flat, hnsw, ivfpq.")
    ] = None,
    noise: Annotated[float, typer.Option(min=0, help="Length of what is added to vectors.")] = 0.3,
    recall: Annotated[float, typer.Option(min=0, max=1, help="Recall@10 to be reached.")] = 0.95,
    keep: Annotated[
        Path | None, typer.Option(help="Folder where embeddings are kept for next time.")
    ] = None,
    plot: PictureOption = None,
) -> None:
    """Recall, time, build and memory of each kind of vector index as it grows. Opens no model."""
    settings = _settings(context)
    on_the_way = _numbers("--growth", growth) or (10_000, 30_000, 100_000, 300_000)
    options = index.IndexOptions(
        sizes=tuple(sorted({*(size for size in on_the_way if size < vectors), vectors})),
        kinds=tuple(kind or ("flat", "hnsw", "ivfpq")),  # type: ignore[arg-type]  # checked there
        noise=noise,
        recall=recall,
        keep=keep,
        plot=plot,
    )
    index.run(_pool_folder(settings, data), settings.embedder, options)


@app.command("store")
def store_command(
    context: typer.Context,
    layers: Annotated[int, typer.Option(min=1, max=1000, help="Layers a block.")] = 30,
    layer_bytes: Annotated[
        int, typer.Option(min=4096, help="Bytes a layer, a multiple of 4,096.")
    ] = 196_608,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks that are read in turn.")] = 4,
    repetitions: Annotated[int, typer.Option(min=1, help="Readings of each block.")] = 20,
    folder: Annotated[
        Path | None,
        typer.Option(help="On the disk to measure; default: the system's temporary folder."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PYTHON",
            help=f"Also measure another store ({', '.join(STORE_PEERS)}) in the environment of "
            "that interpreter; may be repeated.",
        ),
    ] = None,
    peer_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for a peer to start, and for each answer.")
    ] = 600,
) -> None:
    """How near each tier is to the speed of memory, disk and Redis. Opens no model."""
    if layer_bytes % 4096:
        raise InputError(f"--layer-bytes is {layer_bytes}; give a multiple of 4096")
    if folder is not None and not folder.is_dir():
        raise InputError(f"--folder is {folder}, which is no folder")
    options = store.StoreOptions(
        layers,
        layer_bytes,
        blocks,
        repetitions,
        folder=folder or Path(tempfile.gettempdir()),
        peers=tuple(peer_option(text, names=STORE_PEERS, dtypes=()) for text in peer or ()),
        peer_timeout_s=peer_timeout,
    )
    store.run(_settings(context), options)


@app.command("precompute")
def precompute_command(
    context: typer.Context,
    documents: Annotated[int, typer.Option(min=1, help="Documents a repetition.")] = 8,
    tokens: Annotated[int, typer.Option(min=8, max=2000, help="Tokens of a document.")] = 240,
    joined: Annotated[int, typer.Option(min=1, help="Chunks whose rows are joined.")] = 4,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs that the median is of.")] = 5,
    seed: Annotated[int, typer.Option(help="Draws the documents.")] = 0,
) -> None:
    """How much of the model's own prefill speed the corpus job keeps."""
    options = precompute.PrecomputeOptions(documents, tokens, joined, repetitions, seed)
    with _engine(context) as engine:
        precompute.run(engine, options)


@app.command("sealing")
def sealing_command(
    layers: Annotated[int, typer.Option(min=1, help="Layers of a block.")] = 30,
    layer_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a layer.")] = 196_608,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs that the median is of.")] = 30,
) -> None:
    """What encrypting stored KV costs, beside reading and writing it plain. Opens no model."""
    sealing.run(sealing.SealingOptions(layers, layer_bytes, repetitions))


@app.command("tenants")
def tenants_command(
    texts: Annotated[int, typer.Option(min=2, help="Texts of each kind.")] = 200,
    tokens: Annotated[int, typer.Option(min=1, max=8192, help="Tokens of a text.")] = 64,
    repetitions: Annotated[int, typer.Option(min=1, help="Look-ups of each text.")] = 20,
    seed: Annotated[int, typer.Option(help="Draws texts and their order.")] = 0,
) -> None:
    """Whether a look-up's time tells that another tenant's text is stored. Opens no model."""
    tenants.run(tenants.TenantsOptions(texts, tokens, repetitions, seed))


def _numbers(option: str, given: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in given.split(",")) if given is not None else ()
    except ValueError as exc:
        raise InputError(f"{option} is {given!r}; give whole numbers, as in 1024,4096") from exc


def _pool_folder(settings: Settings, name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir() and settings.eval_data is not None:
        folder = settings.eval_data / name
    if not folder.is_dir():
        raise InputError(
            f"{name!r} is no folder, nor one of the setting eval_data (KVRAG_EVAL_DATA)"
        )
    return folder


def _data_path(settings: Settings, name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix == ".jsonl":
        return path
    if settings.eval_data is None:
        raise InputError(
            f"{name!r} is no .jsonl file, and the setting eval_data (KVRAG_EVAL_DATA) names no "
            "folder to find it in"
        )
    return settings.eval_data / f"{name}.jsonl"


def _settings(context: typer.Context) -> Settings:
    return context.obj if isinstance(context.obj, Settings) else Settings()


@contextmanager
def _engine(context: typer.Context, **changed: Any) -> Iterator[Engine]:
    """An engine over an empty home: a benchmark leaves nothing behind in the user's store.

    changed: settings that are others.
    """
    settings = _settings(context)
    with (
        tempfile.TemporaryDirectory(prefix="kvrag-bench-") as home,
        # What is measured is what is named, also where storage is slow.
        Engine.open(settings.apart(Path(home), controller=False, **changed)) as engine,
    ):
        yield engine
