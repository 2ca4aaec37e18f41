"""The process of one peer: JSON lines on standard input and output.

    PYTHON worker.py ADAPTER.py

The first line in says what to load, `{"model", "dtype", "threads", "max_tokens"}`; the answer is
`{"ready": {…}}` with facts about the peer. Every further line is a prompt, `{"ids", "new_tokens"}`;
the answer is `{"ttft_s", "token_s", "ids"}`: seconds from the call to the first token's id, seconds
a further token, and the greedy tokens themselves. A failure is `{"error": sentence}` and the end.

An adapter is a file with `load(model, dtype, threads, max_tokens) -> (generate, facts)`, where
`generate(ids, new_tokens, emit)` calls `emit(token_id)` as each token becomes known and never stops
before `new_tokens`. The clock is here, the same for everybody.

This runs under the peer's own interpreter, so it imports nothing but the standard library.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Emit = Callable[[int], None]
Generate = Callable[[list[int], int, Emit], None]


def main(adapter: str) -> None:
    """Serve until standard input ends."""
    # What the peer prints must not come between the lines: from here on, that is standard error.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        options = json.loads(sys.stdin.readline())
        # Before anything that reads it is imported. Models are folders: no hub is asked.
        os.environ["OMP_NUM_THREADS"] = str(options["threads"])
        os.environ["HF_HUB_OFFLINE"] = "1"
        generate, facts = _load(adapter, **options)
        send({"ready": facts})
        for line in sys.stdin:
            send(_timed(generate, **json.loads(line)))
    except BaseException as exc:
        send({"error": f"{type(exc).__name__}: {exc}"})
        raise


def _load(path: str, **options: Any) -> tuple[Generate, dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("peer_adapter", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded: tuple[Generate, dict[str, Any]] = module.load(**options)
    return loaded


def _timed(generate: Generate, ids: list[int], new_tokens: int) -> dict[str, Any]:
    times: list[float] = []
    tokens: list[int] = []

    def emit(token_id: int) -> None:
        times.append(time.perf_counter())
        tokens.append(token_id)

    begun = time.perf_counter()
    generate(ids, new_tokens, emit)
    if len(tokens) != new_tokens:
        raise RuntimeError(f"{len(tokens)} tokens came, not {new_tokens}")
    return {
        "ttft_s": times[0] - begun,
        "token_s": (times[-1] - times[0]) / max(1, new_tokens - 1),
        "ids": tokens,
    }


if __name__ == "__main__":
    main(sys.argv[1])
