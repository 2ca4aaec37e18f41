"""The plain causal pass: new tokens at the end of a cache, every row computed.

Prompt prefixes, isolated chunks, decoding and the scoring of given continuations are all this one
pass; fusion has passes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvrag.generation.kv_cache import KVCache
from kvrag.models.decoder import Decoder

__all__ = ["KVSink", "append", "extend"]

#: Called with the un-rotated K and V (kv_heads, n, head_dim) of the new rows, layer by layer.
KVSink = Callable[[Tensor, Tensor], None]


@torch.inference_mode()
def append(
    decoder: Decoder, token_ids: Sequence[int], cache: KVCache, sink: KVSink | None = None
) -> None:
    """Append `token_ids` behind what `cache` holds; K and V are all that is wanted.

    The last layer stops at K and V.
    """
    _rows(decoder, token_ids, cache, sink, stop_at_kv=True)


@torch.inference_mode()
def extend(
    decoder: Decoder, token_ids: Sequence[int], cache: KVCache, *, every: bool = False
) -> Tensor:
    """Append `token_ids` behind what `cache` holds.

    Returns:
        Logits float32 (1, vocab) of the last token, or (n, vocab) of `every` one.
    """
    x = _rows(decoder, token_ids, cache, None, stop_at_kv=False)
    return decoder.logits(x if every else x[-1:])


def _rows(
    decoder: Decoder,
    token_ids: Sequence[int],
    cache: KVCache,
    sink: KVSink | None,
    *,
    stop_at_kv: bool,
) -> Tensor:
    begin, end = cache.length, cache.length + len(token_ids)
    cache.reserve(end)
    decoder.reserve(end)
    x = decoder.embed(torch.tensor(token_ids, dtype=torch.int64, device=decoder.device))
    if len(token_ids) == 1 and decoder.steps_natively and not stop_at_kv:
        x = decoder.step(x, cache.kv, begin)
        cache.length = end
        return x
    positions = torch.arange(begin, end, device=decoder.device)
    for layer in decoder.layers:
        q, k, v = layer.project(x)
        if sink is not None:
            sink(k, v)
        into_k, into_v = cache.k[layer.index], cache.v[layer.index]
        layer.put(k, v, into_k, into_v, slice(begin, end))
        if stop_at_kv and layer is decoder.layers[-1]:
            break
        if len(token_ids) == 1:
            mixed = layer.attend_each(q, [into_k], [into_v], [end])
        else:
            mixed = layer.attend(q, into_k[:, :end], into_v[:, :end], positions)
        x = layer.finish(x, mixed)
    cache.length = end
    return x
