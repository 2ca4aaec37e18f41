"""What a stored block depends on, in one digest: weights, config, tokenizer, RoPE and dtype.

Two models that differ in one weight or one RoPE parameter never answer for one another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch
import xxhash

from kvrag.models.config import ModelConfig
from kvrag.models.weights import Weights, tensor_bytes

__all__ = ["model_fingerprint"]


def model_fingerprint(
    config: ModelConfig,
    weights: Weights,
    tokenizer_digest: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> str:
    """64 hex characters. `dtype` is what weights and KV are rounded to, see `Decoder`.

    The weights are read at memory speed with xxh3-128 at every opening: a digest remembered by
    file time would call a changed file the same model.
    """
    digest = hashlib.blake2b(digest_size=32)
    parts = dataclasses.asdict(config) | {
        "tokenizer": tokenizer_digest,
        "dtype": str(dtype),
        "compute_dtype": str(compute_dtype),
    }
    # Not properties of a token's KV: how far a prompt may reach, and where decoding stops.
    for name in ("max_positions", "eos_token_ids"):
        del parts[name]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    for name in weights:
        tensor = weights[name]
        content = xxhash.xxh3_128_digest(tensor_bytes(tensor))
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode() + content)
    return digest.hexdigest()
