"""Writes float32 weights as safetensors, piece by piece: no tensor is ever held whole.

The library's own writer needs a file's tensors in memory together. The format is an 8-byte
little-endian length, that many bytes of JSON that place each tensor, and the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["SHARD_BYTES", "WeightSource", "write_weights"]

#: A file is closed before it grows beyond this, unless one tensor alone does.
SHARD_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class WeightSource:
    """One weight: `blocks()` yields its elements in row order, float32."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


def write_weights(sources: Sequence[WeightSource], folder: Path) -> None:
    """Write `model.safetensors`, or shards of about `SHARD_BYTES` with their index."""
    shards = _shards(sources, SHARD_BYTES)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0])
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, shard)
        places |= dict.fromkeys((source.name for source in shard), name)
    index = {
        "metadata": {"total_size": sum(source.nbytes for source in sources)},
        "weight_map": places,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shards(sources: Sequence[WeightSource], shard_bytes: int) -> list[list[WeightSource]]:
    shards: list[list[WeightSource]] = [[]]
    nbytes = 0
    for source in sources:
        if shards[-1] and nbytes + source.nbytes > shard_bytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(source)
        nbytes += source.nbytes
    return shards


def _write_file(path: Path, sources: Sequence[WeightSource]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        offsets = [end, end := end + source.nbytes]
        header[source.name] = {"dtype": "F32", "shape": source.shape, "data_offsets": offsets}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for source in sources:
            for block in source.blocks():
                file.write(np.ascontiguousarray(block, dtype="<f4").data)
