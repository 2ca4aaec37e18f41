"""What the checks are held against. docs/cli.md has the measurements that the numbers rest on.

Exact properties are bounded by rounding: by the compute dtype where everything is computed, by the
coarser of it and the stored dtype where stored KV takes part. The tightest, of K at its place in
bfloat16, lies three times above what rounding gives where arithmetic is bfloat16, too, and five
times where it is float32; the others lie a factor of ten or more above.
"""

from __future__ import annotations

import torch

from kvrag.models.decoder import Decoder

__all__ = [
    "BLEND_KL",
    "DEFAULT_AGAINST_REUSE",
    "NEGLIGIBLE_KL",
    "TRAINED_NLL",
    "exact_kl",
    "exact_vectors",
    "placed",
    "stored_kl",
]

#: Nats a token, mean over the text set, of whatever blends.
BLEND_KL = 0.6
#: What repairs must not be further from full prefill than plain reuse, but for chance ...
DEFAULT_AGAINST_REUSE = 1.1
#: ... and but for distances that nobody notices.
NEGLIGIBLE_KL = 0.05
#: Of ln(vocabulary): a model that predicts plain English no better has not learned it.
TRAINED_NLL = 0.75

_KL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3}
#: Rounding errors grow from layer to layer ...
_VECTORS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2**-4}
#: ... but not where a vector was only stored and turned, by angles in float32.
_PLACED = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2**-6}


def exact_kl(decoder: Decoder) -> float:
    """Nats between two ways of computing the same."""
    return _KL[decoder.compute_dtype]


def exact_vectors(decoder: Decoder) -> float:
    """Relative distance of K and V between two ways of computing the same."""
    return _VECTORS[decoder.compute_dtype]


def stored_kl(decoder: Decoder) -> float:
    """As `exact_kl` where K and V were stored between."""
    return max(_KL[decoder.compute_dtype], _KL[decoder.dtype])


def placed(decoder: Decoder) -> float:
    """Relative distance of K and V that were stored and turned to their place."""
    return max(_PLACED[decoder.compute_dtype], _PLACED[decoder.dtype])
