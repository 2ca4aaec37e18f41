"""All checks in their order, in a home of their own: the user's store is neither read nor written.

The short form leaves out what takes long: the attention of every strategy's rows, most texts, and
of the others a passage that the answer does not need.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from kvrag.blending import Blending
from kvrag.config import Settings
from kvrag.engine import Engine
from kvrag.fusion import create, strategy_names
from kvrag.models.source import Model
from kvrag.verify.check import Check, Verdict
from kvrag.verify.exact import check_one_chunk, check_ratio_one
from kvrag.verify.fidelity import check_fidelity
from kvrag.verify.mask import check_attention, check_rows, watched
from kvrag.verify.position import check_first_layer, check_placing
from kvrag.verify.prompts import cut, laid_out
from kvrag.verify.texts import TEXTS, Text

__all__ = ["blending_of", "verify"]

_LOG = logging.getLogger(__name__)

#: What is exact is so for any number of tokens: these keep the checks quick.
_CHUNKS, _CHUNK_TOKENS, _QUESTION_TOKENS = 3, 16, 8
#: Where rows are to be scattered.
_MORE_CHUNKS, _MORE_TOKENS = 4, 48
#: Tokens of each answer.
_ANSWER, _SHORT_ANSWER = 16, 8
#: Of the first texts so many passages: the next is one that the answer does not need.
_SHORT_TEXTS, _SHORT_PASSAGES = 2, 3


def verify(
    settings: Settings,
    *,
    model: Model | None = None,
    short: bool = False,
    report: Callable[[str], None] = lambda what: None,
) -> Verdict:
    """Run the checks with the model, dtype, codec and default strategy of `settings`.

    Args:
        model: one that is open already for these settings.
        report: called with what is checked next.

    Raises:
        InputError: the context is too short for the texts.
        ModelError, SettingsError, StoreError: see `Engine.open`.
    """
    begun = time.perf_counter()
    checks: list[Check] = []
    for what, group in _groups(settings, model, short=short):
        report(what)
        checks.extend(group)
    return Verdict(short, time.perf_counter() - begun, tuple(checks))


def blending_of(settings: Settings, model: Model) -> Blending:
    """Whether a server may blend: the short form's verdict, logged.

    A check that cannot be run proves nothing, so blending is refused then, too.
    """
    try:
        verdict = verify(settings, model=model, short=True)
    except Exception as exc:
        reason = f"the check could not be run: {exc}"
        _LOG.exception("full prefill instead of blending: %s", reason)
        return Blending(allowed=False, reason=reason)
    took = f"{len(verdict.checks)} checks in {verdict.seconds:.1f} s"
    if verdict.passed:
        _LOG.info("blending is allowed: %s", took)
    else:
        _LOG.error("full prefill instead of blending (%s): %s", took, verdict.reason)
    return Blending(allowed=verdict.passed, reason=verdict.reason, checks=verdict.checks)


def _groups(
    settings: Settings, model: Model | None, *, short: bool
) -> Iterator[tuple[str, Iterator[Check]]]:
    """What is checked, and its checks; they run as they are asked for."""
    texts, new_tokens = (_short_texts(), _SHORT_ANSWER) if short else (TEXTS, _ANSWER)
    strategies = [name for name in strategy_names() if create(name).uses_blocks]
    with ExitStack() as stack:
        # Exact properties are those of the raw codec and of chunks behind the prefix alone; what
        # a lossy codec costs, and passages before a chunk bring, fidelity measures.
        plain = {"codec": "raw", "corpus_context": ""}
        exact = stack.enter_context(_apart(settings, model, **plain))
        prompt = laid_out(exact, texts[0], new_tokens)
        small = cut(prompt, _CHUNKS, _CHUNK_TOKENS, _QUESTION_TOKENS)
        yield "ratio 1 against full prefill", check_ratio_one(exact, small, strategies)
        yield "one chunk behind its prefix", check_one_chunk(exact, small)
        yield "attention under its mask", check_attention(exact)
        if not short:
            larger = cut(prompt, _MORE_CHUNKS, _MORE_TOKENS, _QUESTION_TOKENS)
            seen: list[float] = []
            model = watched(exact.model, seen)
            watching = stack.enter_context(_apart(settings, model, **plain))
            yield "rows under their mask", check_rows(watching, seen, larger, strategies)
        yield "stored K at its place", check_placing(exact, small)
        yield "layer 0 under every strategy", check_first_layer(exact, small, strategies)
        blended = stack.enter_context(_apart(settings, exact.model))
        prompts = [laid_out(blended, text, new_tokens) for text in texts]
        yield "fidelity on the text set", check_fidelity(blended, prompts, new_tokens)


def _short_texts() -> list[Text]:
    return [
        replace(text, passages=text.passages[:_SHORT_PASSAGES]) for text in TEXTS[:_SHORT_TEXTS]
    ]


@contextmanager
def _apart(settings: Settings, model: Model | None, **other: str) -> Iterator[Engine]:
    """An engine over an empty home that goes with it, with `other` settings."""
    with (
        tempfile.TemporaryDirectory(prefix="kvrag-verify-") as home,
        Engine(settings.apart(Path(home), **other), model=model) as engine,
    ):
        yield engine
