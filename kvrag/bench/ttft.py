"""Time to first token and decode speed of every strategy against transformers, interleaved.

Every repetition draws other chunks in another order and another question, so that nothing but the
system text repeats from one prompt to the next; the blocks of all chunks lie in memory. All
contestants answer the same prompt before the next is drawn, since the machine's speed drifts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvrag.bench.frame import median, show
from kvrag.engine import Engine
from kvrag.errors import MissingExtraError
from kvrag.models.tokenizer import Tokenizer
from kvrag.passages import passage_chunks

__all__ = ["TtftOptions", "run"]

STRATEGIES = ("full", "reuse", "cacheblend")
#: No answer has it. Without it, answers of models without a chat template end with a paragraph.
_NEVER = "\u2063never\u2063"


@dataclass(frozen=True, slots=True)
class TtftOptions:
    """chunks a prompt, tokens a chunk, repetitions, tokens decoded, and the baseline's dtype."""

    chunks: int = 16
    chunk_tokens: int = 256
    repetitions: int = 5
    new_tokens: int = 16
    ratio: float = 0.15
    baseline: bool = True
    baseline_dtype: str | None = None
    seed: int = 0


def run(engine: Engine, options: TtftOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON)."""
    draw = _Prompts(engine.model.tokenizer, options)
    for passage in draw.pool:  # compute the blocks once; they stay in memory
        engine.answer("Warm up?", passages=[passage], strategy="reuse", max_tokens=1)
    baseline = _Baseline(engine, options) if options.baseline else None
    names = (("transformers",) if baseline else ()) + STRATEGIES
    ttft: dict[str, list[float]] = {name: [] for name in names}
    decode: dict[str, list[float]] = {name: [] for name in names}
    stall, tiers, context, ratios = [], set(), [], []
    rng = random.Random(options.seed)
    for _ in range(options.repetitions):
        passages, question = draw.next()
        # The order within a repetition changes too: nobody always runs on warm caches.
        for name in rng.sample(names, len(names)):
            if name == "transformers" and baseline is not None:
                first, token = baseline.time(passages, question)
            else:
                answer = engine.answer(
                    question,
                    passages=passages,
                    strategy=name,
                    ratio=options.ratio,
                    max_tokens=options.new_tokens,
                    stop=_NEVER,
                )
                first = answer.report.ttft_s
                # The end token takes a step, too, and is no part of the answer.
                steps = len(answer.token_ids) - (answer.finish_reason == "length")
                token = answer.report.spans.decode / max(1, steps)
                if name == "cacheblend":
                    ratios.append(answer.report.effective_ratio)
                    stall.append(answer.report.spans.stall)
                    tiers |= {source.tier for source in answer.sources}
                    context.append(sum(draw.tokens(passages)))
            ttft[name].append(first)
            decode[name].append(1000 * token)
    best = min(median(ttft[name]) for name in names if name in ("transformers", "full"))
    result = {
        "benchmark": "ttft",
        "ttft_s": {name: median(times) for name, times in ttft.items()},
        "decode_ms": {name: median(times) for name, times in decode.items()},
        "speedup_over_full": {name: round(best / median(ttft[name]), 2) for name in names},
        "context_tokens": int(median(context)),
        "threads": torch.get_num_threads(),
        "dtype": engine.settings.dtype,
        "compute_dtype": str(engine.model.decoder.compute_dtype).removeprefix("torch."),
        "baseline_dtype": baseline.dtype_name if baseline else None,
        "decode_weights": engine.settings.decode_weights,
        "codec": engine.settings.codec,
        "cache_state": "+".join(sorted(tiers)),
        "requested_ratio": options.ratio,
        "effective_ratio": median(ratios),
        "stall_s": median(stall),
        "repetitions": options.repetitions,
        "model": engine.settings.model,
    }
    rows = [
        (
            name,
            f"{median(ttft[name]):.3f}",
            f"{min(ttft[name]):.3f} - {max(ttft[name]):.3f}",
            f"{best / median(ttft[name]):.2f}",
            f"{median(decode[name]):.1f}",
        )
        for name in names
    ]
    columns = ("strategy", "TTFT s (median)", "range", "x faster than full", "decode ms/token")
    show(f"TTFT, {result['context_tokens']} context tokens, {engine.settings.dtype}", columns, rows,
         result)  # fmt: skip
    return result


class _Prompts:
    """Passages of an exact number of tokens, made of the tokenizer's own whole words."""

    def __init__(self, tokenizer: Tokenizer, options: TtftOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._rng = random.Random(options.seed)
        self._words = list(self._whole_words())
        self.pool = [self._passage() for _ in range(2 * options.chunks)]

    def next(self) -> tuple[list[str], str]:
        passages = self._rng.sample(self.pool, self._options.chunks)
        return passages, f"What is said about{''.join(self._rng.choices(self._words, k=8))}?"

    def tokens(self, passages: Sequence[str]) -> list[int]:
        return [len(chunk.token_ids) for chunk in passage_chunks(passages, self._tokenizer)]

    def _whole_words(self) -> Iterator[str]:
        """Words that, with a space in front, are one token."""
        for token_id in range(self._tokenizer.vocab_size):
            word = self._tokenizer.decode([token_id])
            if word[:1] == " " and len(word) > 3 and word[1:].isascii() and word[1:].isalpha():
                yield word

    def _passage(self) -> str:
        words = self._rng.choices(self._words, k=self._options.chunk_tokens)
        while sum(self.tokens(["".join(words)])) > self._options.chunk_tokens:
            words.pop()
        return "".join(words)


class _Baseline:
    """transformers' full prefill (sdpa) and greedy decoding over the same ids and weights."""

    def __init__(self, engine: Engine, options: TtftOptions) -> None:
        try:
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging
        except ImportError as exc:
            raise MissingExtraError(
                "the baseline needs transformers: pip install 'kvrag[bench]', or --no-baseline"
            ) from exc
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # Where the CPU has no bfloat16 arithmetic, transformers is faster in float32, too.
        default = str(engine.model.decoder.compute_dtype).removeprefix("torch.")
        self.dtype_name = options.baseline_dtype or default
        self._engine, self._new_tokens = engine, options.new_tokens
        self._model = AutoModelForCausalLM.from_pretrained(
            engine.model.folder, dtype=self.dtype_name, attn_implementation="sdpa"
        ).eval()

    @torch.inference_mode()
    def time(self, passages: Sequence[str], question: str) -> tuple[float, float]:
        """TTFT and seconds a decoded token."""
        ids = torch.tensor([self._engine.prompt_ids(question, passages)])
        begun = time.perf_counter()
        out = self._model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(self._new_tokens - 1):
            out = self._model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        end = time.perf_counter()
        return first - begun, (end - first) / max(1, self._new_tokens - 1)
