"""What blending is, written from its definition: the slow, obvious form that runs are held against.

Modules and weights are transformers' own. Nothing is shared with fusion, the decoder or the
kernels: attention is a softmax under a dense mask of (row position, key position) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Which rows go on behind a layer: (layer, positions of the context rows, deviations) → positions.
Choose = Callable[[int, list[int], Tensor], list[int]]


class Dense:
    """A transformers model taken apart; `windows` and `no_rope` put options on single layers."""

    def __init__(self, hf, windows: dict[int, int] | None = None, no_rope: Sequence[int] = ()):
        self.hf = hf
        self.layers = hf.model.layers
        self.windows, self.no_rope = windows or {}, set(no_rope)

    # ---- one layer -------------------------------------------------------------------------------

    def project(self, index: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K, V (heads, rows, dim), un-rotated."""
        layer = self.layers[index]
        attention, h = layer.self_attn, layer.input_layernorm(x)
        dim = attention.head_dim
        q = attention.q_proj(h).view(len(x), -1, dim)
        k = attention.k_proj(h).view(len(x), -1, dim)
        v = attention.v_proj(h).view(len(x), -1, dim)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    def rotate(self, index: int, x: Tensor, positions: Sequence[int]) -> Tensor:
        if index in self.no_rope or not len(positions):
            return x
        cos, sin = self.hf.model.rotary_emb(x, torch.tensor([list(positions)]))
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def visible(self, index: int, query: int, key: int) -> bool:
        window = self.windows.get(index)
        return key <= query and (window is None or query - key < window)

    def attend(
        self, index: int, q: Tensor, rows: Sequence[int], k: Tensor, v: Tensor, keys: Sequence[int]
    ) -> Tensor:
        mask = torch.tensor([[self.visible(index, row, key) for key in keys] for row in rows])
        out = []
        for head in range(q.shape[0]):
            shared = head // (q.shape[0] // k.shape[0])
            scores = q[head] @ k[shared].T / q.shape[-1] ** 0.5
            scores[~mask] = -torch.inf
            out.append(scores.softmax(-1) @ v[shared])
        return torch.cat(out, dim=-1)

    def finish(self, index: int, x: Tensor, mixed: Tensor) -> Tensor:
        layer = self.layers[index]
        x = x + layer.self_attn.o_proj(mixed)
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def logits(self, x: Tensor) -> Tensor:
        return self.hf.lm_head(self.hf.model.norm(x))

    # ---- whole passes ----------------------------------------------------------------------------

    @torch.no_grad()
    def causal(self, ids: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits of every row, and un-rotated K and V of every layer."""
        positions, kv = list(range(len(ids))), []
        x = self.hf.model.embed_tokens(torch.tensor(ids))
        for index in range(len(self.layers)):
            q, k, v = self.project(index, x)
            kv.append((k, v))
            q, k = self.rotate(index, q, positions), self.rotate(index, k, positions)
            x = self.finish(index, x, self.attend(index, q, positions, k, v, positions))
        return self.logits(x), kv

    def isolated(self, prefix: Sequence[int], chunk: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The chunk alone behind its corpus prefix, whose own K and V are dropped."""
        _, kv = self.causal([*prefix, *chunk])
        return [(k[:, len(prefix) :], v[:, len(prefix) :]) for k, v in kv]

    @torch.no_grad()
    def blend(
        self,
        prefix: Sequence[int],
        corpus_prefix: Sequence[int],
        chunks: Sequence[Sequence[int]],
        question: Sequence[int],
        first: int,
        choose: Choose,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The last row's logits, and the final rotated K and V of all positions of every layer.

        Context rows from position `first` on begin; `choose` says which go on behind each layer.
        """
        ids = [*prefix, *(token for chunk in chunks for token in chunk), *question]
        question_start, everywhere = len(ids) - len(question), list(range(len(ids)))
        _, prefix_kv = self.causal(prefix)
        alone = [self.isolated(corpus_prefix, chunk) for chunk in chunks]
        cache = []
        for index in range(len(self.layers)):
            k = torch.cat([prefix_kv[index][0], *(kv[index][0] for kv in alone)], dim=1)
            v = torch.cat([prefix_kv[index][1], *(kv[index][1] for kv in alone)], dim=1)
            k = self.rotate(index, k, everywhere[:question_start])
            room = torch.zeros(k.shape[0], len(question), k.shape[2], dtype=k.dtype)
            cache.append((torch.cat((k, room), dim=1), torch.cat((v, room), dim=1)))

        context = list(range(first, question_start))
        rows = everywhere[first:]
        x = self.hf.model.embed_tokens(torch.tensor(ids)[rows])
        for index in range(len(self.layers)):
            q, k, v = self.project(index, x)
            q, k = self.rotate(index, q, rows), self.rotate(index, k, rows)
            stored = cache[index][1][:, rows]
            deviation = ((v - stored) ** 2).sum(dim=(0, 2))[: len(context)]
            cache[index][0][:, rows], cache[index][1][:, rows] = k, v
            kept = choose(index, context, deviation)
            assert set(kept) <= set(context)
            at = [rows.index(position) for position in [*kept, *everywhere[question_start:]]]
            x, q, rows = x[at], q[:, at], [rows[i] for i in at]
            context = list(kept)
            mixed = self.attend(index, q, rows, *cache[index], everywhere)
            x = self.finish(index, x, mixed)
        return self.logits(x[-1:]), cache
