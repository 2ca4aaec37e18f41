"""Reading a Hugging Face folder: config, weights and the names in between."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvrag.errors import ModelError, ModelNotFoundError

__all__ = ["Weights", "read_json"]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelNotFoundError: the file is not there.
        ModelError: it is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ModelNotFoundError(
            f"{path.parent} is no model folder: {path.name} is missing"
        ) from exc
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name, memory-mapped, on the CPU.

    Raises:
        ModelNotFoundError: the folder holds no `*.safetensors`.
        ModelError: a file is damaged; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelNotFoundError(
                f"{folder} holds no weights: a model folder needs *.safetensors beside config.json"
            )
        self._files: dict[str, Any] = {}
        self._taken: set[str] = set()
        for path in files:
            try:
                handle: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as exc:
                raise ModelError(f"weights file {path} is damaged: {exc}") from exc
            if twice := self._files.keys() & set(handle.keys()):
                raise ModelError(f"{path} repeats the tensor {min(twice)!r} of another file")
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)

    def take(self, name: str, *shape: int) -> Tensor:
        """One tensor, with its shape checked against the config.

        Raises:
            ModelError: the tensor is missing or has another shape.
        """
        if name not in self._files:
            raise ModelError(f"the model's weights lack the tensor {name!r}")
        self._taken.add(name)
        tensor = self[name]
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, but the config needs {shape}"
            )
        if not tensor.is_floating_point():
            raise ModelError(f"tensor {name!r} is {tensor.dtype}, not a floating-point type")
        return tensor

    def check_all_taken(self) -> None:
        """A layer's tensor that nobody took would silently be left out of the model.

        Raises:
            ModelError: names the tensors.
        """
        # Older checkpoints store the rotary table, which everybody computes.
        left = [
            name
            for name in self._files.keys() - self._taken
            if name.startswith("model.layers.") and not name.endswith("rotary_emb.inv_freq")
        ]
        if left:
            shown = ", ".join(sorted(left)[:3]) + (" …" if len(left) > 3 else "")
            raise ModelError(
                f"the weights hold {len(left)} tensors that the config has no use for ({shown})"
            )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a CPU tensor, without a copy."""
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data.cast("B")
