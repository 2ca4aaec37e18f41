"""`kvrag ask`: one question, the answer streamed to stdout."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrag.cli.common import (
    JsonOption,
    format_seconds,
    one_line,
    plain_table,
    print_json,
    read_input_file,
    settings_of,
    show,
    warn,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvrag.answer import Answer, Report, Source
    from kvrag.searching import Search

__all__ = ["ask"]

_FIELDS = ("title", "text")


def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    passages: Annotated[
        Path | None,
        typer.Option(help="JSONL file of {title, text}: answer over these, not the corpus."),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Chunks retrieved.")] = None,
    search: Annotated[
        str | None, typer.Option(help="How chunks are found: hybrid, dense or lexical.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='Filter over metadata: \'{"lang": "en", "year": {"gte": 2000}}\'.',
        ),
    ] = None,
    mmr: Annotated[
        float | None,
        typer.Option(help="0 to 1: part of relevance in choosing chunks, the rest novelty."),
    ] = None,
    distinct: Annotated[
        float | None,
        typer.Option(help="0 to 1: leave out chunks more similar than that to a better one."),
    ] = None,
    rerank: Annotated[
        str | None,
        typer.Option(help="What orders chunks anew: none, or the setting's cross_encoder."),
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="Fusion strategy.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Recompute ratio, 0 to 1.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")
    ] = None,
    show_sources: Annotated[
        bool, typer.Option("--show-sources", help="Show the chunks behind the answer.")
    ] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Show where the time went.")] = False,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="With --json: tell of each context token.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a question.

    Over the corpus, or over passages from a file.
    """
    settings = settings_of(context)
    given = None if passages is None else read_passages(passages)
    looked_for = _search(search, where, mmr, distinct, rerank)
    asked = _question(question)
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or None,
    }
    generation: dict[str, Any] = {
        name: value for name, value in options.items() if value is not None
    }
    from kvrag.engine import Engine
    from kvrag.fusion import create
    from kvrag.generation.params import GenerationParams

    # The engine would refuse these too, but only when the model is open.
    create(settings.strategy if strategy is None else strategy, ratio)
    GenerationParams.of(generation)
    with Engine.open(settings) as engine:
        stream = engine.stream(
            asked,
            passages=given,
            k=k,
            strategy=strategy,
            ratio=ratio,
            search=looked_for,
            per_token=per_token,
            **generation,
        )
        for piece in stream:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        answer = stream.answer
    if as_json:
        print_json(answer.to_dict())
        return
    sys.stdout.write("\n")
    for warning in answer.report.warnings:
        warn(warning)
    if show_sources:
        _show_sources(answer.sources)
    if trace:
        _show_trace(answer)


def read_passages(path: Path) -> list[dict[str, str]]:
    """The passages of a JSONL file of `{"title": …, "text": …}`; the title may be left out.

    Raises InputError that names file and line.
    """
    from kvrag.errors import InputError

    found = []
    for number, line in enumerate(read_input_file(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_passage(line))
        except (ValueError, RecursionError) as exc:
            raise InputError(f"{path}:{number} is no passage: {exc}") from exc
    if not found:
        raise InputError(f"{path} holds no passages")
    return found


def _passage(line: bytes) -> dict[str, str]:
    value: Any = json.loads(line.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError('a JSON object {"title": …, "text": …} is needed')  # noqa: TRY004
    if unknown := sorted(set(value) - set(_FIELDS)):
        raise ValueError(f"unknown fields {', '.join(map(repr, unknown))}")
    fields = {name: text for name, text in value.items() if text is not None}
    for name, text in fields.items():
        if not isinstance(text, str):
            raise ValueError(f"{name!r} is no text")  # noqa: TRY004
        text.encode()  # JSON can spell half a character, which nothing further takes
    if not fields.get("text", "").strip():
        raise ValueError("it has no text")
    return fields


def _search(
    mode: str | None,
    where: str | None,
    mmr: float | None,
    distinct: float | None,
    rerank: str | None,
) -> Search | None:
    """What the options ask of retrieval; None for nothing."""
    from kvrag.errors import InputError
    from kvrag.searching import Search

    if all(given is None for given in (mode, where, mmr, distinct, rerank)):
        return None
    fields: Any = None
    if where is not None:
        try:
            fields = json.loads(where)
        except (ValueError, RecursionError) as exc:
            raise InputError(f"--where is no JSON: {exc}") from exc
        if not isinstance(fields, dict):
            raise InputError(f"--where is {where!r:.80}; a JSON object is needed")
    return replace(Search.of(mode), where=fields, mmr=mmr, distinct=distinct, rerank=rerank)  # type: ignore[arg-type]


def _question(argument: str) -> str:
    from kvrag.errors import InputError

    try:
        if argument == "-":
            return sys.stdin.buffer.read().decode().strip()
        argument.encode()
    except UnicodeError as exc:
        raise InputError("the question is not valid UTF-8") from exc
    return argument


def _show_sources(sources: Sequence[Source]) -> None:
    table = plain_table(title="Sources")
    # All but the text keep their width in a terminal of 80 columns; --json has ids and texts whole.
    for name, width in (("id", 4), ("title", 20), ("document", 9), ("score", 5), ("tier", 4)):
        table.add_column(name, no_wrap=True, min_width=width)
    table.add_column("text", no_wrap=True)
    for source in sources:
        table.add_row(
            source.id,
            shorten(one_line(source.title), width=20, placeholder="…"),
            f"{source.document[:8]}…" if source.document else "",
            "" if source.score is None else f"{source.score:.3f}",
            source.tier,
            shorten(one_line(source.text), width=60, placeholder="…"),
        )
    show(table)


def _show_trace(answer: Answer) -> None:
    table = plain_table("what", "value", title="Trace")
    for what, value in _trace_rows(answer.report, len(answer.token_ids), answer.finish_reason):
        table.add_row(what, value)
    show(table)


def _trace_rows(report: Report, new_tokens: int, finish_reason: str) -> list[tuple[str, str]]:
    spans, tokens = report.spans, report.tokens
    return [
        ("strategy", report.strategy),
        ("time to first token", format_seconds(report.ttft_s)),
        ("retrieve", format_seconds(spans.retrieve)),
        ("load", format_seconds(spans.load)),
        ("stall (load not hidden)", format_seconds(spans.stall)),
        ("compute", format_seconds(spans.compute)),
        ("decode", format_seconds(spans.decode)),
        ("prompt tokens", str(tokens.prompt)),
        ("  reused", str(tokens.reused)),
        ("  recomputed", str(tokens.recomputed)),
        ("  computed", str(tokens.computed)),
        ("new tokens", f"{new_tokens} ({finish_reason})"),
        ("effective ratio", f"{report.effective_ratio:.3f}"),
        ("ratio", _ratio(report)),
        ("foreseen", _foreseen(report)),
        ("prefix_match", "yes" if report.prefix_match else "no"),
        ("dropped chunks", ", ".join(report.dropped) or "none"),
    ]


def _ratio(report: Report) -> str:
    control = report.control
    if control is None:
        return ""
    return f"{'no ratio' if control.ratio is None else f'{control.ratio:g}'} ({control.reason})"


def _foreseen(report: Report) -> str:
    """What the controller predicted, and how wrong it was."""
    control = report.control
    if control is None or control.predicted_ttft_s is None or control.predicted_stall_s is None:
        return "nothing: not measured before"
    return (
        f"{format_seconds(control.predicted_ttft_s)}, "
        f"{format_seconds(control.predicted_stall_s)} of it stall"
        + ("" if control.error is None else f" (off by {control.error:.0%})")
    )
