"""vLLM, in-process: compiled, one sequence at a time, prefix caching on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any


def load(model: str, dtype: str, threads: int, max_tokens: int) -> tuple[Any, dict[str, Any]]:
    """See `worker.py`."""
    # Read when vLLM is imported. Workers of its own would have to be pinned apart from the others.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    import torch
    import vllm

    torch.set_num_threads(threads)
    engine = vllm.LLM(
        model,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=max_tokens,
        # A prompt is one batch: prefill in pieces would be slower.
        max_num_batched_tokens=max_tokens,
        max_num_seqs=1,
        enable_prefix_caching=True,
        disable_log_stats=True,
    ).llm_engine
    requests = itertools.count()

    def generate(ids: list[int], new_tokens: int, emit: Callable[[int], None]) -> None:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        engine.add_request(str(next(requests)), {"prompt_token_ids": ids}, params)
        known = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = output.outputs[0].token_ids
                for token_id in tokens[known:]:
                    emit(int(token_id))
                known = len(tokens)

    return generate, {"version": vllm.__version__, "prefix_cache": True}
