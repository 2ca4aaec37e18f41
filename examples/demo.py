"""Precompute the sample corpus, ask it under full prefill and under two blends, compare.

    make demo [MODEL=gemma3-270m]

Everything goes through the public face; the home folder is kept, so that a second run shows that
nothing is computed twice.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from kvrag import Engine, Settings
from kvrag.answer import Answer
from kvrag.errors import KvragError
from kvrag.precompute.job import Progress
from kvrag.retrieval import load

HERE = Path(__file__).parent
BLENDS = ("true", "fast")
STRATEGIES = ("full", *BLENDS)


def main() -> None:
    console = Console()
    settings = Settings(home=HERE.parent / "demo-home")
    console.print(f"Opening {settings.model} (the very first time converts it) …")
    with Engine.open(settings) as engine:
        precompute(engine, console)
        console.print(
            "full computes all; true and fast take stored KV and compute few rows anew, true more\n"
            "of them, to be nearer to full, and fast, the default, fewer, to be sooner.\n"
            "A model this small often misreads what it is given, under full prefill too: compare\n"
            "the strategies with one another first, then with the expected answer.\n"
        )
        questions = [json.loads(line) for line in (HERE / "questions.jsonl").open()]
        rows = [
            (q["question"], ask(engine, console, q["question"], q["answer"])) for q in questions
        ]
        compare(console, rows)


def precompute(engine: Engine, console: Console) -> None:
    """Step 1: documents in, their KV computed and stored."""
    begun = time.perf_counter()
    with Bar(console=console, transient=True) as bar:
        task = bar.add_task("Adding documents", total=None)

        def show(now: Progress) -> None:
            if now.total_chunks is not None:
                bar.update(
                    task,
                    description="Computing KV",
                    total=now.total_chunks,
                    completed=now.chunks_done,
                )

        done = engine.add(load([HERE / "corpus"]), show)
    console.print(
        f"Corpus: {done.documents_added} documents added, {done.documents_known} known; "
        f"{done.total_chunks} chunks, {done.chunks_stored_before} of them stored before; "
        f"{done.bytes_written / 2**20:.0f} MiB written in {time.perf_counter() - begun:.1f} s\n"
    )


def ask(engine: Engine, console: Console, question: str, expected: str) -> dict[str, Answer]:
    """Step 2: one question under every strategy."""
    console.print(f"[bold]{question}[/]")
    console.print(f"  expected    {expected}", markup=False, highlight=False)
    answers = {}
    for strategy in STRATEGIES:
        answer = engine.answer(question, k=4, strategy=strategy, max_tokens=32, stop="\n")
        answers[strategy] = answer
        console.print(f"  {strategy:10}  {answer.text.strip()}", markup=False, highlight=False)
    sources = ", ".join(
        f"{source.title} ({source.score:.2f}, {source.tier})" for source in answers["fast"].sources
    )
    console.print(f"  sources     {sources}\n", markup=False, highlight=False, style="dim")
    return answers


def compare(console: Console, rows: list[tuple[str, dict[str, Answer]]]) -> None:
    """Step 3: where the time went."""
    columns = [text for name in BLENDS for text in (f"{name} s", "faster", "rows")]
    table = Table("question", "full s", *columns, title="Time to first token")
    speedups: dict[str, list[float]] = {name: [] for name in BLENDS}
    for question, answers in rows:
        full_s = answers["full"].report.ttft_s
        cells = []
        for name in BLENDS:
            report = answers[name].report
            speedups[name].append(full_s / report.ttft_s)
            cells += [
                f"{report.ttft_s:.2f}",
                f"{speedups[name][-1]:.1f} x",
                f"{report.effective_ratio:.0%}",
            ]
        table.add_row(question, f"{full_s:.2f}", *cells)
    medians = [f"{statistics.median(speedups[name]):.1f} x" for name in BLENDS]
    table.add_row("median", "", *(text for median in medians for text in ("", median, "")))
    console.print(table)
    console.print(
        "rows: computed of the context, layer 0 included; the first chunk is exact and never chosen"
    )


if __name__ == "__main__":
    try:
        main()
    except KvragError as exc:
        sys.exit(f"error: {exc}")
