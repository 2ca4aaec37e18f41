"""The layers of a BERT on the CPU: fewer, larger products over weights packed beforehand.

Of a question's embedding two thirds are products, and most of the rest is what lies between
them. Here a layer is four products, one call of attention and two norms. Knows nothing of
tokenizers and pooling: the model goes on to be called as it was.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["speed_up"]

#: Of transformers: their layers have the same parts, and their embeddings are called alike.
_MODELS = {"BertModel", "RobertaModel", "XLMRobertaModel"}


def speed_up(model: Any) -> bool:
    """Give `model`, of transformers, a faster `forward`; False, and nothing done, where none is.

    There is one for encoders of the families BERT, RoBERTa and XLM-RoBERTa in float32 on the CPU
    whose torch has oneDNN. Results differ by rounding. The model keeps no other copy of what its
    layers weigh, so it can not be trained or saved any more.
    """
    config = model.config
    plain = (
        type(model).__name__ in _MODELS
        and not getattr(config, "is_decoder", False)
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and model.dtype == torch.float32
        and model.device.type == "cpu"
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    )
    if plain:
        model.forward = _Forward(model)
        model.encoder.layer = torch.nn.ModuleList()
    return plain


class _Forward:
    """What `model(...)` calls: the last layer's rows, and what its own pooler makes of them."""

    def __init__(self, model: Any) -> None:
        self._embeddings, self._pooler = model.embeddings, model.pooler
        self._layers = [_Layer(layer, model.config) for layer in model.encoder.layer]

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_: object,
    ) -> Any:
        """All three `(texts, tokens)` int64, the mask 0 for padding."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        x: Tensor = self._embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        seen = None  # (texts, 1, 1, tokens) bool
        if attention_mask is not None and not bool(attention_mask.all()):
            seen = attention_mask[:, None, None, :].bool()
        for layer in self._layers:
            x = layer(x, seen)
        pooled = None if self._pooler is None else self._pooler(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)


class _Layer:
    """Attention and MLP with norms behind each (Devlin et al. 2019, as in Vaswani et al. 2017)."""

    def __init__(self, layer: Any, config: Any) -> None:
        attention, own = layer.attention, layer.attention.self
        self._heads = config.num_attention_heads
        self._qkv = _Product(own.query, own.key, own.value)
        self._output = _Product(attention.output.dense)
        self._attention_norm = attention.output.LayerNorm
        self._fused = config.hidden_act == "gelu"
        self._up = _Product(layer.intermediate.dense, gelu=self._fused)
        self._activation = layer.intermediate.intermediate_act_fn
        self._down = _Product(layer.output.dense)
        self._mlp_norm = layer.output.LayerNorm

    def __call__(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """`x` and the result are `(texts, tokens, hidden)`."""
        texts, tokens, hidden = x.shape
        # (3, texts, heads, tokens, head_dim)
        q, k, v = self._qkv(x).view(texts, tokens, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        seen_by = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        joined = seen_by.transpose(1, 2).reshape(texts, tokens, hidden)
        x = self._attention_norm(self._output(joined).add_(x))
        inner = self._up(x)
        if not self._fused:
            inner = self._activation(inner)
        normed: Tensor = self._mlp_norm(self._down(inner).add_(x))
        return normed


class _Product:
    """`x` (…, in) to (…, outs together): one product with the weights of several linear modules.

    oneDNN keeps them in its own order. With few rows that is a tenth faster than MKL's product on
    one thread and a quarter on two, and GELU costs no pass of its own.
    """

    def __init__(self, *parts: Any, gelu: bool = False) -> None:
        weight = torch.cat([part.weight.detach() for part in parts])
        self._bias = torch.cat([part.bias.detach() for part in parts])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._attribute = "gelu" if gelu else "none"

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, self._attribute, [], "none"
        )
        return out
