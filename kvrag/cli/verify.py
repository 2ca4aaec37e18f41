"""`kvrag verify`: whether blending can be trusted with the model in use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvrag.cli.common import (
    JsonOption,
    format_seconds,
    one_line,
    plain_table,
    print_json,
    settings_of,
    show,
)

if TYPE_CHECKING:
    from kvrag.config import Settings
    from kvrag.verify.check import Verdict

__all__ = ["verify"]

_EXIT_FAILED = 4


def verify(
    context: typer.Context,
    short: Annotated[
        bool, typer.Option("--short", help="What `kvrag serve` checks when it starts.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that blending gives what full prefill gives, with the model in use.

    The home stays as it is. Exits with 4 if a check failed.
    """
    settings = settings_of(context)
    from kvrag.verify.gate import verify as run

    verdict = run(settings, short=short, report=_progress)
    if as_json:
        print_json(_facts(settings, verdict))
    else:
        _show(settings, verdict)
    if not verdict.passed:
        raise typer.Exit(_EXIT_FAILED)


def _progress(what: str) -> None:
    sys.stderr.write(f"checking: {what}\n")
    sys.stderr.flush()


def _facts(settings: Settings, verdict: Verdict) -> dict[str, object]:
    chosen = settings.model_dump(include={"model", "dtype", "codec", "strategy", "ratio"})
    return chosen | verdict.to_dict()


def _show(settings: Settings, verdict: Verdict) -> None:
    table = plain_table("check", "of", "found", "bound", "", "what")
    for check in verdict.checks:
        table.add_row(
            check.name,
            check.subject,
            check.shown,
            "" if check.bound is None else f"{check.bound:.3g}",
            "ok" if check.passed else "FAILED",
            one_line(check.sentence),
        )
    failed = sum(not check.passed for check in verdict.checks)
    found = f"{failed} of {len(verdict.checks)} checks failed" if failed else "all checks passed"
    took = format_seconds(verdict.seconds)
    show(table, f"{settings.model}, {settings.dtype}, codec {settings.codec}: {found} in {took}")
