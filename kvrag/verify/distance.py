"""How far apart two results are: distributions in nats, vectors relative to their length."""

from __future__ import annotations

import torch
from torch import Tensor

from kvrag.prefill import Prefilled
from kvrag.verify.divergence import divergence

__all__ = ["kl", "relative"]


def kl(truth: Prefilled, other: Prefilled) -> float:
    """KL divergence of the next token's distribution from `truth`'s, in nats; never below 0."""
    p, q = (prefilled.logits.cpu().double().log_softmax(-1) for prefilled in (truth, other))
    return float(divergence(p, q).sum().clamp(min=0))


def relative(truth: Tensor, other: Tensor) -> float:
    """The largest |other - truth| / |truth| over vectors in the last dimension; 0 for none."""
    truth, other = truth.cpu().double(), other.cpu().double()
    if not truth.numel():
        return 0.0
    tiny = torch.finfo(torch.float32).tiny
    return float(((other - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=tiny)).max())
