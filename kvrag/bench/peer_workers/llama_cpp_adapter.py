"""llama.cpp through llama-cpp-python, over a GGUF file of the wanted type, flash attention on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any


def load(model: str, dtype: str, threads: int, max_tokens: int) -> tuple[Any, dict[str, Any]]:
    """See `worker.py`. `dtype` is that of the file."""
    import llama_cpp

    llama = llama_cpp.Llama(
        model,
        n_ctx=max_tokens,
        n_batch=512,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )

    def generate(ids: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        # It keeps what the prompt shares with the last one from the beginning on.
        for token_id in islice(llama.generate(ids, temp=0.0), new_tokens):
            emit(int(token_id))

    return generate, {"version": llama_cpp.__version__, "prefix_cache": True}
