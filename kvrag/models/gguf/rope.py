"""RoPE as GGUF files describe it, into `rope_parameters` as Hugging Face configs have them.

Scaling stands in keys (linear, yarn) or in small tensors: `rope_freqs` (llama3) and
`rope_factors_long` and `_short` (longrope), whose parameters are found and checked here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.models.gguf.metadata import Metadata

__all__ = ["ROPE_TENSORS", "rope_parameters"]

_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
#: Small tensors that hold RoPE scaling and no weights, by architecture.
ROPE_TENSORS: Mapping[str, tuple[str, ...]] = {
    "llama": (_FREQUENCIES,),
    "smollm3": (_FREQUENCIES,),
    "granite": (_FREQUENCIES,),
    "phi3": (_LONG, _SHORT),
}
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_parameters(
    metadata: Metadata, tensors: Mapping[str, np.ndarray], *, head_dim: int, partial: bool
) -> dict[str, Any]:
    """The parameters of the model's (global) layers.

    Args:
        tensors: those of `ROPE_TENSORS` that the file has: float32 (rotated dimensions / 2,).
        partial: whether the family may rotate a part of a head.

    Raises:
        UnsupportedModelError: a scaling that cannot be given back.
        ModelError: numbers that contradict each other.
    """
    rotated = metadata.size("rope.dimension_count", head_dim)
    if rotated > head_dim or rotated % 2 or (rotated < head_dim and not partial):
        raise UnsupportedModelError(
            f"{metadata.file}: {metadata.architecture}.rope.dimension_count is {rotated}, but the "
            f"head has {head_dim} dimensions; partial rotary embedding of this family is not "
            "supported"
        )
    for name, values in tensors.items():
        if values.shape != (rotated // 2,) or not (np.isfinite(values) & (values > 0)).all():
            raise ModelError(
                f"{metadata.file}: tensor {name!r} of shape {values.shape} is not the "
                f"{rotated // 2} positive divisors of {rotated} rotated dimensions"
            )
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": metadata.positive("rope.freq_base", 10000.0),
    }
    if rotated < head_dim:
        rope["partial_rotary_factor"] = _share(rotated, head_dim)
    kind = metadata.get("rope.scaling.type")
    if kind not in (None, "longrope") and tensors:
        raise UnsupportedModelError(
            f"{metadata.file} scales RoPE twice: by {metadata.architecture}.rope.scaling.type "
            f"{kind!r} and by the tensor {next(iter(tensors))!r}"
        )
    if _FREQUENCIES in tensors:
        return rope | _llama3(metadata.file, tensors[_FREQUENCIES], rope["rope_theta"])
    if kind == "longrope" or tensors:
        return rope | _longrope(metadata, tensors)
    return rope | _by_keys(metadata)


def _by_keys(metadata: Metadata) -> dict[str, Any]:
    # A factor without a type is linear.
    kind = metadata.get("rope.scaling.type") or "linear"
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    original = metadata.size(
        "rope.scaling.original_context_length", metadata.size("context_length")
    )
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModelError(
            f"{metadata.file}: RoPE scaling {kind!r} is not supported; none, linear, yarn and "
            "longrope are"
        )
    names = {
        "attention_factor": "rope.scaling.yarn_attn_factor",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    given = {
        ours: metadata.positive(theirs) for ours, theirs in names.items() if metadata.get(theirs)
    }
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    } | given


def _share(rotated: int, head_dim: int) -> float:
    """The factor that gives `rotated` again when it is multiplied and cut to a whole number."""
    share = rotated / head_dim
    return share if int(head_dim * share) == rotated else math.nextafter(share, 1.0)


def _llama3(file: str, divisors: np.ndarray, theta: float) -> dict[str, Any]:
    """The parameters behind one divisor a frequency.

    Every published model uses the bounds 1 and 4 over 8,192 positions, and the converter assumes
    them; models differ in the factor alone, which is the largest divisor. The guess is checked
    against all divisors.
    """
    factor = float(str(divisors.max()))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not np.allclose(1 / ((1 - kept) / factor + kept), divisors, rtol=1e-4):
        raise UnsupportedModelError(
            f"{file}: its rope_freqs are not llama3 scaling with bounds 1 and 4 over 8192 "
            "positions; use the model's Hugging Face folder"
        )
    return {"rope_type": "llama3", "factor": factor} | _LLAMA3


def _longrope(metadata: Metadata, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    for name in (_LONG, _SHORT):
        if name not in tensors:
            raise ModelError(f"{metadata.file} lacks the tensor {name!r}")
    positions = metadata.size("context_length")
    original = metadata.size("rope.scaling.original_context_length")
    if original == 1:
        raise ModelError(
            f"{metadata.file}: {metadata.architecture}.rope.scaling.original_context_length is 1"
        )
    stretch = positions / original
    expected = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    attention = metadata.positive("rope.scaling.attn_factor", expected)
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "short_factor": _decimals(tensors[_SHORT]),
        "long_factor": _decimals(tensors[_LONG]),
    }
    # Left out where it follows from the lengths, which is exact and the file's float32 is not.
    if not math.isclose(attention, expected, rel_tol=1e-6):
        rope["attention_factor"] = attention
    return rope


def _decimals(values: np.ndarray) -> list[float]:
    return [float(str(value)) for value in values]
