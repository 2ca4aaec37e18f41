"""One mechanism of recomputation for all selectors: rows go through the layers and may drop out.

Rows are computed positions: some of the context, then the whole question. In each layer the
stored K is rotated to its place and put into the cache, the rows are projected, fresh K and V
overwrite the stored, a strategy may narrow the context rows, and only the rows that stay go on.
A row's queries see every cached key that the layer's mask allows, computed or stored. Where a
layer has a window, chunks that no row can see stay out of the cache, whose positions are undefined
there.

Which rows are present may be known on the device alone, and asking it would wait for all that it
has to do. So the walk is planned from what is known before: the candidates, and how many rows stay.

A strategy may ask the question first: the question's rows alone go through the first layers over
the stored KV, and what each context token receives of their attention tells which rows begin. The
pass over the rows finds these layers in the cache already.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvrag.fusion.base import (
    Fused,
    FusionReport,
    FusionRun,
    FusionStrategy,
    LayerStream,
    LayerVisit,
    PlacingStream,
)
from kvrag.fusion.prompt import Prompt
from kvrag.fusion.selection import Choice
from kvrag.generation.kv_cache import KVCache
from kvrag.kernels import Deviation
from kvrag.kernels.native import StoredKV
from kvrag.models.decoder import Decoder

__all__ = ["LayerState", "LayerwiseRun", "LayerwiseStrategy"]


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a strategy sees of one layer.

    candidates: how many context rows could have begun. positions: int64 (m,), ascending, of the
    context rows; k, v: fresh, (kv_heads, m, head_dim), K rotated; stored_k, stored_v: the same
    rows as they were stored. scores: (m,), what the rows were given when they began, if the
    strategy gave scores then. received: for each context row the attention (m,) that all present
    rows, the question's included, pay to it in this layer.
    """

    index: int
    num_layers: int
    candidates: int
    positions: Tensor
    k: Tensor
    v: Tensor
    stored_k: Tensor
    stored_v: Tensor
    scores: Tensor | None
    received: Callable[[], Tensor]
    deviation: Deviation

    def k_deviation(self) -> Tensor:
        """Squared distance of fresh from stored K of each context row (m,), over all heads."""
        return self.deviation(self.k, self.stored_k)

    def v_deviation(self) -> Tensor:
        """Squared distance of fresh from stored V of each context row (m,), over all heads."""
        return self.deviation(self.v, self.stored_v)


@dataclass(frozen=True, slots=True)
class LayerwiseStrategy(FusionStrategy):
    """Which context rows begin, and which of them go on behind each layer."""

    def candidates(self, prompt: Prompt) -> range:
        """Positions of the context rows that may be computed: those that may need repair."""
        return prompt.repairable if self.ratio > 0 else range(0)

    def question_layers(self, decoder: Decoder, prompt: Prompt) -> Sequence[int]:
        """Layers, ascending, in which to sum the question's attention before any row begins."""
        return ()

    def begin(self, prompt: Prompt, candidates: range, attention: Tensor) -> Choice | None:
        """Which of the `candidates` begin; None is all of them.

        Args:
            attention: (layers asked, candidates), the sum over heads and question rows of the
                attention that each candidate receives in each of `question_layers`.
        """
        return None

    def judges(self, layer: int, num_layers: int) -> bool:
        """Whether `narrow` is to be asked in this layer."""
        return False

    def narrow(self, state: LayerState) -> Choice:
        """Which of the context rows of a layer go on behind it."""
        raise NotImplementedError(f"{type(self).__name__} judges a layer and does not narrow")

    def first_chunks(self, decoder: Decoder, prompt: Prompt) -> list[int]:
        candidates = self.candidates(prompt)
        first = candidates.start if candidates else prompt.question_start
        ends = [span.end for span in prompt.chunks]
        return [bisect_right(ends, layer.first_visible(first)) for layer in decoder.layers]

    def expected_rows(self, prompt: Prompt, layer: int, num_layers: int) -> float:
        """Context rows that go on behind a layer, as far as that is known before."""
        return self.ratio * len(self.candidates(prompt))

    def expected_visits(self, decoder: Decoder, prompt: Prompt) -> list[LayerVisit]:
        asked = self.question_layers(decoder, prompt) if self.candidates(prompt) else ()
        alone = asked[-1] + 1 if asked else 0
        count = len(decoder.layers)
        rows = [self.expected_rows(prompt, layer, count) for layer in range(count)]
        first_pass = [LayerVisit(layer, 0) for layer in range(alone)]
        return [*first_pass, *map(LayerVisit, range(count), rows)]

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
        decoder.reserve(prompt.length)
        self._strategy, self._decoder, self._prompt = strategy, decoder, prompt
        self._layers, self._cache = layers, cache
        # Asked once: whether something is such a protocol takes as long as a small product.
        native = decoder.kernels.native is not None
        self._placing = layers if native and isinstance(layers, PlacingStream) else None
        self._first_chunks = strategy.first_chunks(decoder, prompt)
        self._candidates = strategy.candidates(prompt)
        self._token_ids = torch.tensor(prompt.token_ids, device=decoder.device)
        self._question = torch.arange(prompt.question_start, prompt.length, device=decoder.device)
        self._asked = list(strategy.question_layers(decoder, prompt)) if self._candidates else []
        self._attention: list[Tensor] = []
        self._pulled = 0
        self._extra_rows = self._context_rows = 0
        self._selected: Tensor | None = None
        self._scores = torch.full((prompt.context_tokens,), torch.nan, device=decoder.device)
        if self._asked:
            self._ask_from_the_first_layer()
        else:
            self._begin()

    def step(self) -> Fused | None:
        if self._asked:
            self._ask()
            return None
        return self._compute()

    def cancel(self) -> None:
        self._layers.close()

    # ---- the question's own pass -------------------------------------------------------------

    def _ask_from_the_first_layer(self) -> None:
        self._layer = 0
        self._x = self._decoder.embed(self._token_ids[self._question])

    def _ask(self) -> None:
        """One layer of the question's rows over the stored KV."""
        cache, index, end = self._cache, self._layer, self._prompt.length
        layer = self._decoder.layers[index]
        # Any candidate may become a row, so that every chunk a candidate sees must be there.
        self._pull(index, self._candidates.start)
        keys, values = cache.k[index][:, :end], cache.v[index][:, :end]
        self._layer += 1
        self._extra_rows += len(self._question)
        if index not in self._asked:
            self._x = layer.advance(self._x, self._question, keys, values)
            return
        q, k, v = layer.project(self._x)
        layer.put(k, v, keys, values, self._question)
        mixed, received = layer.attend_received(q, keys, values, self._question)
        self._attention.append(received[self._candidates.start : self._candidates.stop])
        if index == self._asked[-1]:
            self._asked = []
            self._begin()
        else:
            self._x = layer.finish(self._x, mixed)

    # ---- the pass over the rows --------------------------------------------------------------

    def _begin(self) -> None:
        """The rows that the strategy wants, at the first layer."""
        candidates, device = self._candidates, self._decoder.device
        attention = torch.empty(0, len(candidates), device=device)
        if self._attention:
            attention = torch.stack(self._attention)
        rows = torch.arange(candidates.start, candidates.stop, device=device)
        choice = self._strategy.begin(self._prompt, candidates, attention) if candidates else None
        self._given: Tensor | None = None
        if choice is not None:
            self._note(rows, choice.scores)
            rows, self._given = rows[choice.rows], choice.scores[choice.rows]
            self._selected = rows
        self._attention.clear()
        self._positions = torch.cat((rows, self._question))
        self._x = self._decoder.embed(self._token_ids[self._positions])
        self._layer = 0

    @property
    def _num_context(self) -> int:
        """How many of the present rows are context rows; they come first."""
        return len(self._positions) - len(self._question)

    def _compute(self) -> Fused | None:
        cache, index, end = self._cache, self._layer, self._prompt.length
        layer = self._decoder.layers[index]
        if self._strategy.uses_blocks and index >= self._pulled:
            first = self._candidates.start if self._num_context else self._prompt.question_start
            self._pull(index, first)
        keys, values = cache.k[index][:, :end], cache.v[index][:, :end]
        num_layers, m = len(self._decoder.layers), self._num_context
        final, judged = index == num_layers - 1, m and self._strategy.judges(index, num_layers)
        self._layer += 1
        if not final and not judged:
            self._context_rows += m
            self._x = layer.advance(self._x, self._positions, keys, values)
            return None
        q, k, v = layer.project(self._x)
        if judged:
            keep = self._narrow(index, q, k, v)
            self._x, q, self._positions = self._x[keep], q[:, keep], self._positions[keep]
        else:
            layer.put(k, v, keys, values, self._positions)
        self._context_rows += self._num_context
        if final:
            # K and V of every row are written; only the last row's logits are wanted.
            self._x, q, self._positions = self._x[-1:], q[:, -1:], self._positions[-1:]
        self._x = layer.finish(self._x, layer.attend(q, keys, values, self._positions))
        if not final:
            return None
        cache.length = end
        self._layers.close()
        return Fused(self._decoder.logits(self._x), self._report())

    def _pull(self, index: int, first: int) -> None:
        """Stored K and V of one layer into the cache, K rotated to its place.

        `first`: the position of the first row that may be there.
        """
        layer, cache = self._decoder.layers[index], self._cache
        visible = layer.first_visible(first)
        spans = self._prompt.chunks[self._first_chunks[index] :]

        def place(stored: Mapping[int, StoredKV]) -> list[int]:
            seen = [i for i in stored if visible < self._prompt.chunks[i].end]
            chunks = [(stored[i], self._prompt.chunks[i].start) for i in seen]
            bad = layer.put_stored(chunks, cache.k[index], cache.v[index])
            return [seen[place] for place in bad]

        pulled: Sequence[tuple[Tensor, Tensor] | None]
        if self._placing is not None:
            pulled = self._placing.place_layer(place)
        else:
            pulled = self._layers.next_layer()
        seen = [
            (*kv, span.start)
            for span, kv in zip(spans, pulled, strict=True)
            if kv is not None and visible < span.end
        ]
        if seen:
            layer.put_chunks(seen, cache.k[index], cache.v[index])
        self._pulled = index + 1

    def _narrow(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate and write fresh K and V; indices of the rows that stay, the question's too."""
        cache, m = self._cache, self._num_context
        num_layers, layer = len(self._decoder.layers), self._decoder.layers[index]
        k = layer.rotate(k, self._positions)
        positions = self._positions[:m]
        fresh_k, fresh_v = k[:, :m], v[:, :m]
        stored_k, stored_v = cache.k[index][:, positions], cache.v[index][:, positions]
        cache.write(index, self._positions, k, v)
        choice = self._strategy.narrow(
            LayerState(
                index=index,
                num_layers=num_layers,
                candidates=len(self._candidates),
                positions=positions,
                k=fresh_k,
                v=fresh_v,
                stored_k=stored_k,
                stored_v=stored_v,
                scores=self._given,
                received=lambda: self._received(index, q, positions),
                deviation=self._decoder.kernels.deviation,
            )
        )
        self._note(positions, choice.scores)
        if self._given is not None:
            self._given = self._given[choice.rows]
        if self._selected is None:
            self._selected = positions[choice.rows]
        question = torch.arange(m, len(self._positions), device=positions.device)
        return torch.cat((choice.rows, question))

    def _received(self, index: int, q: Tensor, positions: Tensor) -> Tensor:
        end = self._prompt.length
        keys, values = self._cache.k[index][:, :end], self._cache.v[index][:, :end]
        layer = self._decoder.layers[index]
        return layer.attend_received(q, keys, values, self._positions)[1][positions]

    def _note(self, positions: Tensor, scores: Tensor) -> None:
        """Remember the latest score of each row, for the report."""
        self._scores[positions - len(self._prompt.prefix_ids)] = scores.to(self._scores.dtype)

    def _report(self) -> FusionReport:
        selected = self._selected
        if selected is None:
            candidates = self._candidates
            selected = torch.arange(candidates.start, candidates.stop)
        return FusionReport(selected, self._context_rows + self._extra_rows, self._scores)
