"""The tensors of a Hugging Face folder by name, memory-mapped."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvrag.errors import ModelError, ModelNotFoundError
from kvrag.models.folder import INDEX, weight_files
from kvrag.models.safetensors_header import StoredTensor, read_header

__all__ = ["Weights", "tensor_bytes"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: How multimodal models call their language part, and how it is called alone.
_LANGUAGE_PART = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name, memory-mapped, on the CPU.

    Of a multimodal model only the language part is here, under the names that it has in a model
    of its own. Opening reads headers alone.

    Raises:
        ModelNotFoundError: weights, or one of several files of them, are not there.
        UnsupportedModelError: weights in a format that is not read.
        ModelError: a file is damaged; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored = _language_part(_stored_tensors(folder))
        self._files = {
            path: _open(path) for path in sorted({stored.file for stored in self._stored.values()})
        }
        self._taken: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        try:
            tensor: Tensor = self._files[stored.file].get_tensor(stored.name)
        except (SafetensorError, AttributeError) as exc:  # a type that torch does not have
            raise ModelError(
                f"tensor {stored.name!r} of {stored.file} cannot be read as {stored.dtype}: {exc}"
            ) from exc
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._stored))

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors, from the headers."""
        return sum(stored.num_elements for stored in self._stored.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored, from the headers."""
        return sum(stored.nbytes for stored in self._stored.values())

    def take(self, name: str, *shape: int) -> Tensor:
        """One tensor of numbers, with its shape checked against the config.

        Raises:
            ModelError: the tensor is missing, has another shape, is of no floating-point type, or
                holds NaN or infinity; the message names tensor and file.
        """
        if name not in self._stored:
            raise ModelError(
                f"the weights in {self._folder} lack the tensor {name!r}{self._nearest(name)}"
            )
        self._taken.add(name)
        tensor, stored = self[name], self._stored[name]
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"tensor {stored.name!r} has shape {tuple(tensor.shape)}, but the config needs "
                f"{shape} ({stored.file})"
            )
        if tensor.dtype not in _FLOATS:
            raise ModelError(
                f"tensor {stored.name!r} is {tensor.dtype}, not one of "
                f"{', '.join(map(str, _FLOATS))} ({stored.file})"
            )
        # Runs at memory speed and passes NaN on, where `isfinite` is thirty times slower.
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ModelError(
                f"tensor {stored.name!r} holds NaN or infinity: {stored.file} is damaged"
            )
        return tensor

    def check_all_taken(self) -> None:
        """A layer's tensor that nobody took would silently be left out of the model.

        Raises:
            ModelError: names tensors and a file.
        """
        # Older checkpoints store the rotary table, which everybody computes.
        left = [
            stored
            for name, stored in sorted(self._stored.items())
            if name not in self._taken
            and name.startswith("model.layers.")
            and not name.endswith("rotary_emb.inv_freq")
        ]
        if left:
            shown = ", ".join(stored.name for stored in left[:3]) + (" …" if len(left) > 3 else "")
            raise ModelError(
                f"{left[0].file} holds tensors that the config has no use for: "
                f"{len(left)} of the weights ({shown})"
            )

    def _nearest(self, name: str) -> str:
        """What the tensor may be called instead: of the same layer, and wanted by nobody yet."""
        numbers = re.findall(r"\d+", name)
        others = [
            other
            for other in self._stored.keys() - self._taken
            if re.findall(r"\d+", other) == numbers
        ]
        near = difflib.get_close_matches(name, sorted(others), n=1, cutoff=0.75)
        return f"; the nearest name there is {near[0]!r}" if near else ""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a CPU tensor, without a copy."""
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data.cast("B")


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """What the headers of all files hold, by the name in the file."""
    files = weight_files(folder)
    for path, promised in files.items():
        if not path.exists():
            lost = f", and with it the tensor {promised[0]!r} by {INDEX}" if promised else ""
            raise ModelNotFoundError(
                f"{folder} is incomplete: the weights file {path.name} is missing{lost}; "
                f"{sum(other.exists() for other in files)} of {len(files)} files are there"
            )
    found: dict[str, StoredTensor] = {}
    for path, promised in files.items():
        stored = {tensor.name: tensor for tensor in read_header(path)}
        for name in promised or stored:
            if name not in stored:
                raise ModelError(f"{path} lacks the tensor {name!r}, which {INDEX} promises in it")
            if name in found:
                raise ModelError(f"{path} repeats the tensor {name!r} of {found[name].file.name}")
            found[name] = stored[name]
    return found


def _language_part(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under the names of a model without eyes; unchanged where there are none."""
    if not any(name.startswith(tuple(_LANGUAGE_PART)) for name in stored):
        return dict(stored)
    language = {name: tensor for name, tensor in stored.items() if name.startswith("lm_head.")}
    for name, tensor in stored.items():
        for prefix, plain in _LANGUAGE_PART.items():
            if name.startswith(prefix):
                language[plain + name.removeprefix(prefix)] = tensor
    return language


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as exc:
        raise ModelNotFoundError(f"weights file {path} is not there any more") from exc
    except (OSError, SafetensorError) as exc:
        raise ModelError(f"weights file {path} is damaged: {exc}") from exc
