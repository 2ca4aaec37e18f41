"""`kvrag store advise`: which is the cheapest tier that still hides its delay?"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvrag.cli.common import (
    JsonOption,
    format_bytes,
    format_seconds,
    plain_table,
    print_json,
    settings_of,
    show,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvrag.config import Settings
    from kvrag.engine import Engine
    from kvrag.fusion.controller import TierAdvice, TierPrice
    from kvrag.fusion.prompt import Prompt

__all__ = ["advise"]

#: Of which the first warm up.
_REPETITIONS = 4
_CONFIGURED = ("ram", "disk")


def advise(
    context: typer.Context,
    tokens: Annotated[
        int | None, typer.Option(help="Context tokens of a prompt; default: k full chunks.")
    ] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=GB/S:PRICE",
            help="A tier, its speed (ram and disk are measured without) and its price of a "
            "gigabyte a month, if it has one; may be repeated. Default: ram and disk.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Which is the cheapest tier from which a prompt's KV loads unnoticed?

    The model's speed, and that of ram and of the disk that the home lies on, are measured.
    """
    settings = settings_of(context)
    candidates = [parse_tier(text) for text in tier or _CONFIGURED]
    wanted = settings.k * settings.chunk_tokens if tokens is None else tokens
    advice = measured_advice(settings, wanted, candidates)
    if as_json:
        print_json(dataclasses.asdict(advice))
        return
    _show(advice)


def parse_tier(text: str) -> TierPrice:
    """A tier of the form `name`, `name=speed`, `name=speed:price` or `name=:price`.

    Raises InputError.
    """
    from kvrag.errors import InputError
    from kvrag.fusion.controller import TierPrice

    name, _, numbers = text.partition("=")
    speed, _, price = numbers.partition(":")
    try:
        gb_s, cost = (float(number) if number.strip() else None for number in (speed, price))
    except ValueError as exc:
        raise InputError(f"tier {text!r} is not of the form name=GB/s:price") from exc
    if not name.strip() or (gb_s is None and name.strip() not in _CONFIGURED):
        raise InputError(
            f"tier {text!r} has no speed; {' and '.join(_CONFIGURED)} alone are measured: give "
            "name=GB/s:price"
        )
    return TierPrice(name.strip(), None if gb_s is None else gb_s * 1e9, cost)


def measured_advice(settings: Settings, tokens: int, candidates: Sequence[TierPrice]) -> TierAdvice:
    """Measure with the model and strategy of `settings`, in a folder beside the home's files.

    Raises:
        InputError: no tokens, or more than the model's context holds.
        ModelError, SettingsError, StoreError: see `Engine.open`.
    """
    import tempfile

    from kvrag.engine import Engine

    folder = next(path for path in (settings.home, *settings.home.parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".kvrag-advise-", dir=folder) as scratch:
        with Engine.open(settings.apart(Path(scratch), ram_bytes=2**62)) as engine:
            prompt = _prompt(engine, tokens)
            for _ in range(_REPETITIONS):
                engine.fill(prompt, new_tokens=1)
            engine.fill(prompt, new_tokens=1, strategy="full")
            nbytes = engine.stats().tiers[-1].nbytes
            controller, model = engine.controller, engine.model
            strategy = engine.default_strategy
        with Engine(settings.apart(Path(scratch), ram_bytes=0), model=model) as engine:
            engine.controller = controller
            for _ in range(_REPETITIONS):
                _drop_page_cache(Path(scratch) / "kv")
                engine.fill(prompt, new_tokens=1)
    return controller.cheapest_tier(
        tokens,
        candidates,
        strategy=strategy,
        nbytes_per_token=nbytes / tokens,
        chunk_tokens=settings.chunk_tokens,
    )


def _prompt(engine: Engine, tokens: int) -> Prompt:
    """Chunks of tokens that differ; what they say does not matter to the clock."""
    from kvrag.errors import InputError
    from kvrag.fusion.prompt import Prompt

    config, size = engine.model.decoder.config, engine.settings.chunk_tokens
    laid_out = engine.prompt("What is this about?", ["One."])
    room = config.max_positions - len(laid_out.prefix_ids) - len(laid_out.question_ids) - 1
    if not 1 <= tokens <= room:
        raise InputError(f"tokens is {tokens}; it must lie between 1 and {room} for this model")
    # A step without a common divisor with the vocabulary, so that no chunk equals another.
    step = next(n for n in range(7919, 2 * 7919) if math.gcd(n, config.vocab_size) == 1)
    ids = [index * step % config.vocab_size for index in range(tokens)]
    chunks = [ids[begin : begin + size] for begin in range(0, tokens, size)]
    return Prompt.build(laid_out.prefix_ids, chunks, laid_out.question_ids, prefix_match=True)


def _drop_page_cache(folder: Path) -> None:
    """So that the disk is measured, and not the memory that hides it; where the system can."""
    import os

    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.rglob("*.kv"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _show(advice: TierAdvice) -> None:
    columns = ("tier", "GB/s", "price", "load", "stall", "TTFT", "hidden")
    table = plain_table(*columns)
    for check in advice.tiers:
        if check.hides is None:
            table.add_row(check.name, "not measured")
            continue
        seconds = (check.load_s, check.stall_s, check.ttft_s)
        table.add_row(
            check.name,
            f"{(check.bytes_per_s or 0) / 1e9:.3g}",
            "" if check.price is None else f"{check.price:g}",
            *(format_seconds(one or 0) for one in seconds),
            "yes" if check.hides else "no",
        )
    heading = (
        f"{advice.tokens} context tokens ({format_bytes(advice.nbytes)} of KV), "
        f"{advice.strategy} at {advice.ratio:g}: computing takes "
        f"{format_seconds(advice.compute_s)}, full prefill {format_seconds(advice.full_s)}"
    )
    show(heading, table, _conclusion(advice))


def _conclusion(advice: TierAdvice) -> str:
    if advice.choice is not None:
        return f"the cheapest tier that hides its delay is {advice.choice}"
    if not any(check.hides for check in advice.tiers):
        return "no tier hides its delay"
    return "give prices to learn which is the cheapest: --tier disk=:0.08"
