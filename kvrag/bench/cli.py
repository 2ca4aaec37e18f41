"""`kvrag bench`: one command a benchmark; each prints a table and one JSON line last."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvrag.bench import fidelity, layers, ttft
from kvrag.config import Settings
from kvrag.engine import Engine
from kvrag.errors import InputError

__all__ = ["app"]


class Half(StrEnum):
    """Halves of an evaluation set."""

    even = "even"
    odd = "odd"
    all = "all"


app = typer.Typer(
    help="Measure speed and fidelity on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.command("ttft")
def ttft_command(
    context: typer.Context,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks a prompt.")] = 16,
    chunk_tokens: Annotated[int, typer.Option(min=8, max=2048, help="Tokens a chunk.")] = 256,
    repetitions: Annotated[int, typer.Option(min=1, help="Prompts that everybody answers.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded a prompt.")] = 16,
    ratio: Annotated[float, typer.Option(min=0, max=1, help="Recompute ratio.")] = 0.15,
    baseline: Annotated[bool, typer.Option(help="Also measure transformers.")] = True,
    baseline_dtype: Annotated[
        str | None, typer.Option(help="transformers' dtype; default: what we calculate in.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws chunks and questions.")] = 0,
) -> None:
    """Time to first token and decode speed of every strategy against transformers."""
    options = ttft.TtftOptions(
        chunks=chunks,
        chunk_tokens=chunk_tokens,
        repetitions=repetitions,
        new_tokens=new_tokens,
        ratio=ratio,
        baseline=baseline,
        baseline_dtype=baseline_dtype,
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
    ratio: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="May be repeated; default 0.15.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens compared.")] = 32,
    seed: Annotated[int, typer.Option(help="Draws the items.")] = 0,
) -> None:
    """KL and gold-answer NLL of reuse, random selection and CacheBlend against full prefill."""
    options = fidelity.FidelityOptions(items, half.value, tuple(ratio or (0.15,)), new_tokens, seed)
    with _engine(context) as engine:
        for name in data:
            fidelity.run(engine, _data_path(engine.settings, name), options)


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
    options = fidelity.FidelityOptions(items, half.value, (), new_tokens, seed)
    with _engine(context) as engine:
        for name in data:
            layers.run(engine, _data_path(engine.settings, name), options)


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


@contextmanager
def _engine(context: typer.Context) -> Iterator[Engine]:
    """An engine over an empty home: a benchmark leaves nothing behind in the user's store."""
    settings = context.obj if isinstance(context.obj, Settings) else Settings()
    with tempfile.TemporaryDirectory(prefix="kvrag-bench-") as home:
        values = settings.model_dump() | {"home": Path(home)}
        with Engine.open(Settings(**values)) as engine:
            yield engine
