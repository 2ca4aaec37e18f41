"""Decoding under a CUDA graph: a step's kernels, captured once and launched by one call a token.

A small model's step is a few hundred short kernels, and starting them from Python takes longer than
they run. A graph replays them with the same addresses, so that everything a step reads lies in
fixed memory: token id, position, K and V. The position is a number on the device; attention over
all of the cache masks what stands behind it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvrag.generation.kv_cache import KVCache
from kvrag.models.decoder import Decoder
from kvrag.models.forward import extend

__all__ = ["FixedStep", "GraphedDecoding", "Step", "capture_cuda", "eager_steps"]

_log = logging.getLogger(__name__)

#: Appends a token by its id; logits (1, vocab) of the one behind it, valid until the next call.
Step = Callable[[int], Tensor]
#: Positions of the smallest cache; larger ones are twice as large each.
_LEAST_POSITIONS = 1024
#: Runs before the capture: kernels are compiled and libraries make their workspaces in the first.
_WARM_UPS = 3


class FixedStep:
    """One decode step over memory that never moves, with nothing in it that waits for the device.

    Its tensors are made, and must be used, in inference mode.
    """

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self._decoder = decoder
        decoder.reserve(capacity)
        self.cache = KVCache(
            decoder.config, capacity, dtype=decoder.compute_dtype, device=decoder.device
        )
        for tensor in (*self.cache.k, *self.cache.v):
            # Warming up calculates with it.
            tensor.zero_()
        self._token_id = torch.zeros(1, dtype=torch.int64, device=decoder.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=decoder.device)

    def load(self, cache: KVCache) -> None:
        """Begin behind what `cache` holds."""
        n = cache.length
        for layer, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
            self.cache.write(layer, slice(0, n), k[:, :n], v[:, :n])
        self._position.fill_(n)

    def put(self, token_id: int) -> None:
        """Choose the token that the next `run` appends."""
        self._token_id.fill_(token_id)

    def run(self) -> Tensor:
        """Append the token; logits float32 (1, vocab) of the one behind it."""
        position, cache = self._position, self.cache
        x = self._decoder.embed(self._token_id)
        for layer in self._decoder.layers:
            q, k, v = layer.project(x)
            into_k, into_v = cache.k[layer.index], cache.v[layer.index]
            layer.put(k, v, into_k, into_v, position)
            x = layer.finish(x, layer.attend(q, into_k, into_v, position))
        position.add_(1)
        return self._decoder.logits(x)


def capture_cuda(step: FixedStep) -> Callable[[], Tensor]:
    """A CUDA graph of `step.run`; its result is the same tensor every time.

    Raises:
        RuntimeError: CUDA's, if something in the step cannot be captured.
    """
    with torch.cuda.device(step.cache.k[0].device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                step.run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on with what they do on the GPU.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = step.run()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def eager_steps(decoder: Decoder, cache: KVCache) -> Step:
    """What continues the sequence in `cache`, kernel by kernel."""
    return lambda token_id: extend(decoder, [token_id], cache)


class GraphedDecoding:
    """The captured step of one decoder, for one sequence at a time. Thread-safe.

    A sequence's K and V are copied into the graph's own memory at its beginning, which takes a part
    of one step's time; a capture for each sequence would take that of tens of steps. Sequences that
    come while the graph is in use are continued kernel by kernel, and so are all once a capture has
    failed.

    Args:
        capture: returns what does the same as `FixedStep.run` to the same memory.
    """

    def __init__(
        self,
        decoder: Decoder,
        capture: Callable[[FixedStep], Callable[[], Tensor]] = capture_cuda,
    ) -> None:
        self._decoder, self._capture = decoder, capture
        self._in_use = threading.Lock()
        self._captured: tuple[FixedStep, Callable[[], Tensor]] | None = None
        self._failed = False

    @contextlib.contextmanager
    def steps(self, cache: KVCache, new_tokens: int) -> Iterator[Step]:
        """What continues the sequence in `cache` by at most `new_tokens`.

        Under the graph `cache` itself stays as it is.
        """
        if self._failed or not self._in_use.acquire(blocking=False):
            yield eager_steps(self._decoder, cache)
            return
        try:
            yield self._graphed_steps(cache, new_tokens) or eager_steps(self._decoder, cache)
        finally:
            self._in_use.release()

    @torch.inference_mode()
    def _graphed_steps(self, cache: KVCache, new_tokens: int) -> Step | None:
        """None if there is no graph."""
        length = min(cache.length + new_tokens, self._decoder.config.max_positions)
        if self._captured is None or self._captured[0].cache.capacity < length:
            self._recapture(length)
        if self._captured is None:
            return None
        fixed, replay = self._captured
        fixed.load(cache)

        @torch.inference_mode()
        def step(token_id: int) -> Tensor:
            fixed.put(token_id)
            return replay()

        return step

    def _recapture(self, length: int) -> None:
        """A graph with room for `length` positions, or a line in the log."""
        # The smaller one goes first: there may be no room for both.
        self._captured = None
        capacity = _LEAST_POSITIONS
        while capacity < length:
            capacity *= 2
        try:
            fixed = FixedStep(self._decoder, min(capacity, self._decoder.config.max_positions))
            self._captured = fixed, self._capture(fixed)
        except Exception as exc:
            # CUDA, Triton and torch each raise their own, and every answer can do without a graph.
            self._failed = True
            _log.warning("decoding runs without a CUDA graph, which cannot be captured: %s", exc)
