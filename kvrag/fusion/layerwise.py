"""One pass over the layers in which rows may drop out: the mechanics that strategies share.

Rows are computed positions: some of the context, then the whole question. In each layer the
stored K is rotated to its place and put into the cache, the rows are projected, a strategy may
narrow the context rows, fresh K and V overwrite the stored, and only the rows that stay go on.
A row's queries see every cached key that the layer's mask allows, computed or stored. Where a
layer has a window, chunks that no present row sees stay out of the cache, whose positions are
undefined there: rows only become fewer, so no later row of the layer sees them either.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrag.fusion.base import (
    Fused,
    FusionReport,
    FusionRun,
    FusionStrategy,
    LayerStream,
)
from kvrag.fusion.prompt import Prompt
from kvrag.generation.kv_cache import KVCache
from kvrag.models.decoder import Decoder

__all__ = ["LayerState", "LayerwiseRun", "LayerwiseStrategy"]


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a strategy sees of one layer before the fresh K and V overwrite the stored.

    positions: int64 (m,), ascending, of the context rows; k, v: fresh, (kv_heads, m, head_dim),
    K rotated; stored_k, stored_v: the same rows as they were stored.
    """

    index: int
    num_layers: int
    positions: Tensor
    k: Tensor
    v: Tensor
    stored_k: Tensor
    stored_v: Tensor


@dataclass(frozen=True, slots=True)
class LayerwiseStrategy(FusionStrategy):
    """A strategy of one pass: which context rows begin, and which of them go on."""

    @abstractmethod
    def first_row(self, prompt: Prompt) -> int:
        """Position of the first context row to compute; `question_start` for none.

        All context rows from there on are computed in layer 0.
        """

    def narrow(self, selectable: int, state: LayerState) -> Tensor | None:
        """Indices into `state.positions`, ascending, of the rows that go on; None where
        the strategy does not judge: all go on.

        Args:
            selectable: how many context rows began.
        """
        return None

    def first_chunks(self, decoder: Decoder, prompt: Prompt) -> list[int]:
        first = self.first_row(prompt)
        ends = [span.end for span in prompt.chunks]
        return [bisect_right(ends, layer.first_visible(first)) for layer in decoder.layers]

    def start(
        self, decoder: Decoder, prompt: Prompt, layers: LayerStream, cache: KVCache
    ) -> LayerwiseRun:
        return LayerwiseRun(self, decoder, prompt, layers, cache)


class LayerwiseRun(FusionRun):
    """See the module's text."""

    def __init__(
        self,
        strategy: LayerwiseStrategy,
        decoder: Decoder,
        prompt: Prompt,
        layers: LayerStream,
        cache: KVCache,
    ) -> None:
        cache.reserve(prompt.length)
        self._strategy, self._decoder, self._prompt = strategy, decoder, prompt
        self._layers, self._cache = layers, cache
        first = strategy.first_row(prompt)
        self._first_chunks = strategy.first_chunks(decoder, prompt)
        token_ids = torch.tensor(prompt.token_ids[first:], device=decoder.device)
        self._positions = torch.arange(first, prompt.length, device=decoder.device)
        self._selectable = prompt.question_start - first
        self._x = decoder.embed(token_ids)
        self._layer = 0
        self._context_rows = 0
        self._narrowed = False
        self._selected = self._positions[: self._selectable]

    @property
    def _num_context(self) -> int:
        """How many of the present rows are context rows; they come first."""
        return len(self._positions) - len(self._prompt.question_ids)

    def step(self) -> Fused | None:
        cache, index = self._cache, self._layer
        layer = self._decoder.layers[index]
        if self._strategy.uses_blocks:
            self._pull(index)
        q, k, v = layer.project(self._x)
        k = layer.rotate(k, self._positions)
        keep = self._narrow(k, v)
        cache.write(index, self._positions, k, v)
        final = index == len(self._decoder.layers) - 1
        if keep is not None:
            self._positions = self._positions[keep]
        self._context_rows += self._num_context
        if keep is not None and not self._narrowed:
            self._narrowed = True
            self._selected = self._positions[: self._num_context]
        if final:
            # K and V of every row are written; only the last row's logits are wanted.
            keep = torch.tensor([len(self._x) - 1], device=self._decoder.device)
            self._positions = self._positions[-1:]
        if keep is not None:
            self._x, q = self._x[keep], q[:, keep]
        end = self._prompt.length
        mixed = layer.attend(q, cache.k[index][:, :end], cache.v[index][:, :end], self._positions)
        self._x = layer.finish(self._x, mixed)
        self._layer += 1
        if not final:
            return None
        cache.length = end
        self._layers.close()
        report = FusionReport(self._selected, self._context_rows)
        return Fused(self._decoder.logits(self._x), report)

    def cancel(self) -> None:
        self._layers.close()

    def _pull(self, index: int) -> None:
        """Stored K and V of one layer into the cache, K rotated to its place."""
        layer = self._decoder.layers[index]
        rows = self._positions.tolist()
        spans = self._prompt.chunks[self._first_chunks[index] :]
        for span, (k, v) in zip(spans, self._layers.next_layer(), strict=True):
            # The first row that does not stand before the chunk sees most of it.
            row = rows[bisect_left(rows, span.start)]
            if layer.first_visible(row) >= span.end:
                continue
            positions = torch.arange(span.start, span.end, device=self._decoder.device)
            k = k.to(self._decoder.device, self._decoder.compute_dtype)
            self._cache.write(index, slice(span.start, span.end), layer.rotate(k, positions), v)

    def _narrow(self, k: Tensor, v: Tensor) -> Tensor | None:
        """Indices of the rows that stay, the question's among them; None keeps all."""
        m = self._num_context
        if m == 0:
            return None
        index, positions = self._layer, self._positions[:m]
        state = LayerState(
            index=index,
            num_layers=len(self._decoder.layers),
            positions=positions,
            k=k[:, :m],
            v=v[:, :m],
            stored_k=self._cache.k[index][:, positions],
            stored_v=self._cache.v[index][:, positions],
        )
        chosen = self._strategy.narrow(self._selectable, state)
        if chosen is None:
            return None
        question = torch.arange(m, len(self._positions), device=positions.device)
        return torch.cat((chosen, question))
