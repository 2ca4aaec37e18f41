"""Who runs in the TTFT benchmark: kvrag's strategies, transformers, and peers, behind one face.

Each answers the same prompt greedily and says how long the first token and the others took.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvrag.answer import Report
from kvrag.bench.peers import Peer, Timing
from kvrag.bench.prompts import DrawnPrompt
from kvrag.engine import Engine
from kvrag.errors import MissingExtraError
from kvrag.fusion import create

__all__ = ["PREFIX_CACHED", "Contestant", "Measured", "Ours", "PeerContestant", "Transformers"]

#: No answer has it. Without it, answers of models without a chat template end with a paragraph.
_NEVER = "\u2063never\u2063"
#: Behind a peer's name: it has just read the same passages in the same order.
PREFIX_CACHED = ", prefix cached"


@dataclass(frozen=True, slots=True)
class Measured:
    """One prompt's answer.

    report, tiers: of kvrag's own answers. same_question: it is the one that everybody answered.
    """

    timing: Timing
    report: Report | None = None
    tiers: frozenset[str] = frozenset()
    same_question: bool = True


class Contestant(ABC):
    """One that answers prompts."""

    #: The figures that it gives, by the names they have in tables; the first is of a cold prompt.
    names: tuple[str, ...]
    #: Whether the first of them is a prefill of the whole prompt.
    computes_all: bool

    @abstractmethod
    def measure(self, prompt: DrawnPrompt) -> Mapping[str, Measured]:
        """Answer the prompt; one result a name.

        Raises:
            PeerError: a peer failed.
        """


class Ours(Contestant):
    """A fusion strategy of kvrag. ratio: None for the settings' or the strategy's own.

    Raises:
        InputError: no such strategy, or not with this ratio.
    """

    def __init__(
        self, engine: Engine, strategy: str, *, ratio: float | None, new_tokens: int
    ) -> None:
        create(strategy, ratio)
        self.names, self.computes_all = (strategy,), strategy == "full"
        self._engine, self._ratio, self._new_tokens = engine, ratio, new_tokens

    def measure(self, prompt: DrawnPrompt) -> Mapping[str, Measured]:
        answer = self._engine.answer(
            prompt.question,
            passages=prompt.passages,
            strategy=self.names[0],
            ratio=self._ratio,
            max_tokens=self._new_tokens,
            stop=_NEVER,
        )
        report = answer.report
        # The end token takes a step, too, and is no part of the answer.
        steps = len(answer.token_ids) - (answer.finish_reason == "length")
        timing = Timing(report.ttft_s, report.spans.decode / max(1, steps), answer.token_ids)
        tiers = frozenset(source.tier for source in answer.sources)
        return {self.names[0]: Measured(timing, report, tiers)}


class Transformers(Contestant):
    """transformers' full prefill (sdpa) and greedy decoding over the same ids and weights."""

    names = ("transformers",)
    computes_all = True

    def __init__(self, engine: Engine, *, dtype: str, new_tokens: int) -> None:
        try:
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging
        except ImportError as exc:
            raise MissingExtraError(
                "the baseline needs transformers: pip install 'kvrag[bench]', or --no-baseline"
            ) from exc
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._engine, self._new_tokens = engine, new_tokens
        self._model = AutoModelForCausalLM.from_pretrained(
            engine.model.folder, dtype=dtype, attn_implementation="sdpa"
        ).eval()

    @torch.inference_mode()
    def measure(self, prompt: DrawnPrompt) -> Mapping[str, Measured]:
        ids = torch.tensor([self._engine.prompt_ids(prompt.question, prompt.passages)])
        begun = time.perf_counter()
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        tokens = [out.logits[:, -1].argmax(dim=-1, keepdim=True)]
        first = time.perf_counter()
        for _ in range(self._new_tokens - 1):
            out = self._model(tokens[-1], past_key_values=out.past_key_values, use_cache=True)
            tokens.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
        token_s = (time.perf_counter() - first) / max(1, self._new_tokens - 1)
        timing = Timing(first - begun, token_s, tuple(int(token) for token in tokens))
        return {self.names[0]: Measured(timing)}


class PeerContestant(Contestant):
    """A peer. One that caches prefixes is asked again about the passages that it has just read."""

    computes_all = True

    def __init__(self, engine: Engine, label: str, peer: Peer, *, new_tokens: int) -> None:
        cached = (label + PREFIX_CACHED,) if peer.caches_prefixes else ()
        self.names = (label, *cached)
        self._engine, self._peer, self._new_tokens = engine, peer, new_tokens

    def measure(self, prompt: DrawnPrompt) -> Mapping[str, Measured]:
        return {
            name: self._measure(
                prompt.passages, question, same_question=question is prompt.question
            )
            for name, question in zip(self.names, (prompt.question, prompt.follow_up), strict=False)
        }

    def _measure(self, passages: Sequence[str], question: str, *, same_question: bool) -> Measured:
        ids = self._engine.prompt_ids(question, passages)
        return Measured(self._peer.time(ids, self._new_tokens), same_question=same_question)
