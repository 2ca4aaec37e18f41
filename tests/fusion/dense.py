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
    """A transformers model taken apart; windows, RoPE, norms and multipliers are its own.

    `context_length` is what LongRoPE's factors are chosen by, the config's if not given.
    """

    def __init__(self, hf, context_length: int | None = None):
        self.hf, self.config = hf, hf.config
        self.layers = hf.model.layers
        self.context_length = context_length or self.config.max_position_embeddings
        self.residual = getattr(self.config, "residual_multiplier", 1.0)
        self._isolated: dict[tuple[int | None, ...], list[tuple[Tensor, Tensor]]] = {}

    # ---- one layer -------------------------------------------------------------------------------

    def embed(self, ids: Sequence[int]) -> Tensor:
        x = self.hf.model.embed_tokens(torch.tensor(ids))
        return x * getattr(self.config, "embedding_multiplier", 1.0)

    def project(self, index: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K, V (heads, rows, dim), un-rotated."""
        layer = self.layers[index]
        attention, dim = layer.self_attn, layer.self_attn.head_dim
        h = layer.input_layernorm(x) if hasattr(layer, "input_layernorm") else x
        if hasattr(attention, "qkv_proj"):
            kv = self.config.num_key_value_heads * dim
            q, k, v = attention.qkv_proj(h).split([attention.o_proj.in_features, kv, kv], dim=-1)
        else:
            q, k, v = attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)
        over_all_heads = self.config.model_type == "olmo2"
        if over_all_heads:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (rows.view(len(x), -1, dim) for rows in (q, k, v))
        if hasattr(attention, "q_norm") and not over_all_heads:
            q, k = attention.q_norm(q), attention.k_norm(k)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    def rotate(self, index: int, x: Tensor, positions: Sequence[int]) -> Tensor:
        attention = self.layers[index].self_attn
        if not getattr(attention, "use_rope", True) or not len(positions):
            return x
        # transformers chooses LongRoPE's factors anew by the last position of each call.
        asked = torch.tensor([[*positions, self.context_length - 1]])
        by_type = (attention.layer_type,) if self.config.model_type == "gemma3_text" else ()
        cos, sin = (table[0, :-1].to(x) for table in self.hf.model.rotary_emb(x, asked, *by_type))
        rotated, passed = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        one, two = rotated.chunk(2, dim=-1)
        return torch.cat((rotated * cos + torch.cat((-two, one), dim=-1) * sin, passed), dim=-1)

    def window(self, index: int) -> int | None:
        """Of a layer; Mistral and Phi-3 have one for all."""
        attention = self.layers[index].self_attn
        if hasattr(attention, "sliding_window"):
            return attention.sliding_window
        return getattr(self.config, "sliding_window", None)

    def visible(self, index: int, rows: Sequence[int], keys: Sequence[int]) -> Tensor:
        """Which rows see which keys: bool (rows, keys)."""
        distance = torch.tensor(rows)[:, None] - torch.tensor(keys)
        window = self.window(index)
        return (distance >= 0) & (distance < (len(keys) if window is None else window))

    def attend(
        self, index: int, q: Tensor, rows: Sequence[int], k: Tensor, v: Tensor, keys: Sequence[int]
    ) -> Tensor:
        mask, scale = self.visible(index, rows, keys), self.layers[index].self_attn.scaling
        out = []
        for head in range(q.shape[0]):
            shared = head // (q.shape[0] // k.shape[0])
            scores = q[head] @ k[shared].T * scale
            scores[~mask] = -torch.inf
            out.append(scores.softmax(-1) @ v[shared])
        return torch.cat(out, dim=-1)

    def paid(
        self, index: int, q: Tensor, rows: Sequence[int], k: Tensor, keys: Sequence[int]
    ) -> Tensor:
        """The attention of all heads and rows that each key receives."""
        mask, scale = self.visible(index, rows, keys), self.layers[index].self_attn.scaling
        received = torch.zeros(len(keys), dtype=q.dtype)
        for head in range(q.shape[0]):
            scores = q[head] @ k[head // (q.shape[0] // k.shape[0])].T * scale
            scores[~mask] = -torch.inf
            received += scores.softmax(-1).sum(dim=0)
        return received

    def finish(self, index: int, x: Tensor, mixed: Tensor) -> Tensor:
        layer = self.layers[index]
        mixed = layer.self_attn.o_proj(mixed)
        # Only with norms behind the MLP is the norm "post attention" one of attention's output.
        if not hasattr(layer, "post_feedforward_layernorm"):
            x = x + mixed * self.residual
            return x + layer.mlp(layer.post_attention_layernorm(x)) * self.residual
        x = x + layer.post_attention_layernorm(mixed)
        h = layer.pre_feedforward_layernorm(x) if hasattr(layer, "pre_feedforward_layernorm") else x
        return x + layer.post_feedforward_layernorm(layer.mlp(h))

    def logits(self, x: Tensor) -> Tensor:
        logits = self.hf.lm_head(self.hf.model.norm(x))
        return logits / getattr(self.config, "logits_scaling", 1.0)

    # ---- whole passes ----------------------------------------------------------------------------

    @torch.no_grad()
    def causal(self, ids: Sequence[int]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits of every row, and un-rotated K and V of every layer."""
        positions, kv = list(range(len(ids))), []
        x = self.embed(ids)
        for index in range(len(self.layers)):
            q, k, v = self.project(index, x)
            kv.append((k, v))
            q, k = self.rotate(index, q, positions), self.rotate(index, k, positions)
            x = self.finish(index, x, self.attend(index, q, positions, k, v, positions))
        return self.logits(x), kv

    def isolated(self, prefix: Sequence[int], chunk: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The chunk alone behind its corpus prefix, whose own K and V are dropped."""
        name = (*prefix, None, *chunk)
        if name not in self._isolated:
            _, kv = self.causal([*prefix, *chunk])
            self._isolated[name] = [(k[:, len(prefix) :], v[:, len(prefix) :]) for k, v in kv]
        return self._isolated[name]

    @torch.no_grad()
    def question_attention(
        self,
        prefix: Sequence[int],
        corpus_prefix: Sequence[int],
        chunks: Sequence[Sequence[int]],
        question: Sequence[int],
    ) -> Tensor:
        """(layers, positions): the sum over heads and question rows of the attention that each
        position receives, where chunks have not seen one another."""
        nothing: Choose = lambda layer, context, deviation: context  # noqa: E731
        received: list[Tensor] = []
        self.blend(prefix, corpus_prefix, chunks, question, [], nothing, received=received)
        return torch.stack(received)

    @torch.no_grad()
    def blend(
        self,
        prefix: Sequence[int],
        corpus_prefix: Sequence[int],
        chunks: Sequence[Sequence[int]],
        question: Sequence[int],
        begin: Sequence[int],
        choose: Choose,
        *,
        received: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
        """The last row's logits, and the final rotated K and V of all positions of every layer.

        The third is bool (layers, positions): which keys some row saw. The others do not matter.
        Context rows at the positions `begin` begin; `choose` says which go on behind each layer.
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

        context = list(begin)
        rows = [*begin, *everywhere[question_start:]]
        x = self.embed([ids[row] for row in rows])
        seen = torch.zeros(len(self.layers), len(ids), dtype=torch.bool)
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
            seen[index] = self.visible(index, rows, everywhere).any(dim=0)
            if received is not None:
                received.append(self.paid(index, q, rows, cache[index][0], everywhere))
            mixed = self.attend(index, q, rows, *cache[index], everywhere)
            x = self.finish(index, x, mixed)
        return self.logits(x[-1:]), cache, seen
