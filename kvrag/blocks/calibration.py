"""Which channels of K deserve more bits: those whose rounding would be loudest in the scores.

A channel's noise in the scores is the product of how far K's numbers range in it, which is what a
step is proportional to, and how large queries are in it. Few channels, of low frequency and of few
heads, bring most: an eighth of all bring three quarters or more (docs/codecs.md). The loudest are
taken over all layers and heads together, so that every head ends up about as exact as the others.
"""

from __future__ import annotations

import torch

from kvrag.blocks.context import DEFAULT_CONTEXT
from kvrag.models.source import Model

__all__ = ["fine_channels"]

#: Of so many channels of K one is fine, in the whole model.
_ONE_OF = 8
#: First positions, whose K and queries are unlike all others.
_SKIPPED = 4


@torch.inference_mode()
def fine_channels(model: Model) -> list[list[list[int]]]:
    """For each layer, for each of its KV heads, the channels that get more bits, ascending.

    One pass over a built-in text of some 700 tokens. The same on the same machine with the same
    number of threads; elsewhere rounding may choose between channels that are as good.
    """
    decoder = model.decoder
    config, tokenizer = decoder.config, model.tokenizer
    ids = [*tokenizer.bos_ids, *tokenizer.encode(DEFAULT_CONTEXT)][: config.max_positions]
    decoder.reserve(len(ids))
    positions = torch.arange(len(ids), device=decoder.device)
    x = decoder.embed(torch.tensor(ids, device=decoder.device))
    loud = []
    for layer in decoder.layers:
        q, k, v = layer.project(x)
        # Rotated, a query is as keys of all distances before it see it.
        rotated = layer.rotate(q, positions)[:, _SKIPPED:].float()
        sizes = rotated.square().mean(1).view(config.num_kv_heads, -1, config.head_dim).sum(1)
        middle = k[:, _SKIPPED:].float()
        loud.append(sizes * (middle.amax(1) - middle.amin(1)).square())
        x = layer.finish(x, layer.attend(q, layer.rotate(k, positions), v, positions))
    noise = torch.stack(loud).cpu()  # (layers, kv_heads, head_dim)
    chosen = torch.zeros(noise.numel(), dtype=torch.bool)
    # Stable: among equals the first, on every machine.
    chosen[noise.flatten().argsort(descending=True, stable=True)[: noise.numel() // _ONE_OF]] = True
    return [[head.nonzero()[:, 0].tolist() for head in layer] for layer in chosen.view(noise.shape)]
