"""From a GGUF file's tensors to Hugging Face weights, float32, a few megabytes at a time.

All that can be wrong is found before the first byte is handed out, save numbers that are not
finite, which are found on the way. What llama.cpp's converter changed is changed back here: it
permutes the rows of Q and K in the llama-like families, and writes Gemma's norm weights as 1 + w.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gguf import dequantize
from gguf.constants import GGMLQuantizationType as Quantisation

from kvrag.errors import ModelError, UnsupportedModelError
from kvrag.models.gguf.file import GGUFFile, GGUFTensor
from kvrag.models.gguf.names import Weight, expected_weights
from kvrag.models.gguf.rope import ROPE_TENSORS
from kvrag.models.safetensors_writer import WeightSource

__all__ = ["rope_tensors", "weight_sources"]

_QUANTISATIONS = frozenset(
    getattr(Quantisation, name)
    for name in (
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    )
)
#: Elements that are dequantised at once: they stay in a processor's cache.
_BLOCK_ELEMENTS = 1 << 20


def rope_tensors(file: GGUFFile, architecture: str) -> dict[str, np.ndarray]:
    """The small tensors that hold RoPE scaling: float32 vectors by name.

    Raises:
        UnsupportedModelError: a quantisation that is not supported.
        ModelError: numbers that are not finite.
    """
    found = {}
    for name in ROPE_TENSORS.get(architecture, ()):
        if name in file.tensors:
            tensor = _checked(file, file.tensors[name])
            found[name] = np.concatenate([*_blocks(file, tensor, None, 0.0)]).reshape(tensor.shape)
    return found


def weight_sources(
    file: GGUFFile, architecture: str, config: Mapping[str, Any]
) -> list[WeightSource]:
    """The weights of the model with the config.json `config`, in the order of the file.

    Raises:
        UnsupportedModelError: a tensor that the family does not have, or a quantisation that is
            not supported.
        ModelError: a tensor is missing, or its shape contradicts the config; and later, when a
            source is read: numbers that are not finite.
    """
    expected = expected_weights(architecture, config)
    for name in expected:
        if name not in file.tensors:
            raise ModelError(f"{file.name} lacks the tensor {name!r}")
    sources = []
    for name, tensor in file.tensors.items():
        _checked(file, tensor)
        if name in ROPE_TENSORS.get(architecture, ()):
            continue
        if name not in expected:
            raise UnsupportedModelError(
                f"{file.name}: unknown tensor {name!r}; {architecture} models of this config "
                "have none of that name"
            )
        weight = expected[name]
        if tensor.shape != weight.shape:
            raise ModelError(
                f"{file.name}: tensor {name!r} has shape {tensor.shape}, but by the file's own "
                f"keys it is {weight.shape}"
            )
        sources.append(_source(file, tensor, weight))
    return sources


def _source(file: GGUFFile, tensor: GGUFTensor, weight: Weight) -> WeightSource:
    order = _unpaired(tensor.shape[0], weight.paired_heads) if weight.paired_heads else None
    return WeightSource(
        weight.name, weight.shape, lambda: _blocks(file, tensor, order, weight.shift)
    )


def _checked(file: GGUFFile, tensor: GGUFTensor) -> GGUFTensor:
    if tensor.quantisation not in _QUANTISATIONS:
        raise UnsupportedModelError(
            f"{file.name}: tensor {tensor.name!r} has the unsupported quantisation "
            f"{tensor.quantisation.name}; supported are "
            f"{', '.join(sorted(kind.name for kind in _QUANTISATIONS))}"
        )
    return tensor


def _unpaired(rows: int, heads: int) -> np.ndarray:
    """For each row of Q or K the stored row: int64 (rows,).

    A rotation turns dimension i of a head together with i + half; they are stored side by side.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _blocks(
    file: GGUFFile, tensor: GGUFTensor, order: np.ndarray | None, shift: float
) -> Iterator[np.ndarray]:
    """The elements in row order, float32 (n,) each."""
    stored = file.rows(tensor)
    if order is not None and len(tensor.shape) == 1:
        # A bias is one stored row, and its elements are what is in order.
        stored = stored.reshape(len(order), -1)
    width = math.prod(tensor.shape) // max(1, len(stored))
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    for first in range(0, len(stored), step):
        some = slice(first, first + step)
        rows = stored[some] if order is None else stored[order[some]]
        # Rows are whole quantisation blocks, so that several make one longer row; a scale that is
        # no number is found below.
        with np.errstate(all="ignore"):
            block = dequantize(rows.reshape(1, -1), tensor.quantisation).reshape(-1)
        if not np.isfinite(block).all():
            raise ModelError(
                f"{file.name}: tensor {tensor.name!r} holds numbers that are not finite"
            )
        yield block + np.float32(shift) if shift else block
