"""kvboost over a transformers model, with its defaults: chunks of 128 tokens, selective repair."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any


class _NeverEnds:
    """The tokenizer, but without an end token: every answer has the length that was asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return None if name == "eos_token_id" else getattr(self._tokenizer, name)


def load(model: str, dtype: str, threads: int, max_tokens: int) -> tuple[Any, dict[str, Any]]:
    """See `worker.py`."""
    import torch
    from kvboost import KVBoost
    from kvboost.engine import GenerationMode
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Its `from_pretrained` does not pass the limit that its engine demands, and loads float16.
    engine = KVBoost(
        model=AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval(),
        tokenizer=tokenizer,
        max_cache_bytes=4 << 30,
        device="cpu",
    )
    engine._encode = list  # prompts come as token ids
    engine.tokenizer = _NeverEnds(tokenizer)

    def generate(ids: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        engine.generate(
            ids, max_new_tokens=new_tokens, mode=GenerationMode.CHUNK_KV_REUSE, on_token=emit
        )

    return generate, {"version": version("kvboost"), "prefix_cache": True}
