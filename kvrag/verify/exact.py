"""Where fusion must give full prefill: everything recomputed, and one chunk behind its prefix."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from kvrag.engine import Engine
from kvrag.fusion import Prompt, create
from kvrag.prefill import Prefilled
from kvrag.verify.bounds import exact_kl, exact_vectors, stored_kl
from kvrag.verify.check import Check
from kvrag.verify.distance import kl, relative
from kvrag.verify.prompts import with_chunks

__all__ = ["check_one_chunk", "check_ratio_one"]


def check_ratio_one(engine: Engine, prompt: Prompt, strategies: list[str]) -> Iterator[Check]:
    """Ratio 1 is full prefill, for each strategy that computes context rows.

    Behind another prefix the first chunk has to be repaired, too, so that nothing stored remains:
    what is left is rounding, whatever the stored dtype.
    """
    every = Prompt.build(
        (*prompt.prefix_ids, prompt.prefix_ids[-1]),
        [span.token_ids for span in prompt.chunks],
        prompt.question_ids,
        prefix_match=False,
    )
    # Blocks are there from now on: what computes them would count as computed rows.
    engine.fill(every, strategy="reuse", new_tokens=1)
    full = engine.fill(every, strategy="full", new_tokens=1)
    for name in strategies:
        most = engine.fill(every, strategy=create(name, 1.0), new_tokens=1)
        if most.effective_ratio == 0:
            continue
        yield Check.of(
            "ratio 1",
            name,
            kl(full, most),
            exact_kl(engine.model.decoder),
            "KL to full prefill with every row recomputed",
        )
        # Sharper: one row left out in a hundred is hardly seen in the logits.
        yield Check.of(
            "ratio 1 KV",
            name,
            max(relative(a, b) for a, b in zip(_kv(full), _kv(most), strict=True)),
            exact_vectors(engine.model.decoder),
            "K and V of all layers with every row recomputed, relative distance",
        )


def check_one_chunk(engine: Engine, prompt: Prompt) -> Iterator[Check]:
    """A chunk right behind the prefix that it was computed behind needs no repair."""
    one = with_chunks(prompt, [prompt.chunks[0].token_ids])
    full, reuse = (engine.fill(one, strategy=name, new_tokens=1) for name in ("full", "reuse"))
    yield Check.of(
        "one chunk",
        "reuse",
        kl(full, reuse),
        stored_kl(engine.model.decoder),
        "KL to full prefill with the stored KV of one chunk behind its own prefix",
    )


def _kv(prefilled: Prefilled) -> list[Tensor]:
    """K and V of every layer (kv_heads, prompt tokens, head_dim)."""
    cache = prefilled.cache
    return [tensor[:, : cache.length] for tensor in (*cache.k, *cache.v)]
