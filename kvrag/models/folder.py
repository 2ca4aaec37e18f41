"""The files of a Hugging Face model folder, by name: which are needed, which are there.

Nothing here reads a tensor, and nothing heavy is imported.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kvrag.errors import ModelError, ModelNotFoundError, UnsupportedModelError

__all__ = ["INDEX", "is_lfs_pointer", "missing_files", "read_json", "weight_files"]

#: Which shard holds which tensor.
INDEX = "model.safetensors.index.json"

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth")


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


def is_lfs_pointer(content: bytes) -> bool:
    """Whether a file that begins so stands for another: cloned without `git lfs`."""
    return content.startswith(b"version https://git-lfs.github.com/spec/")


def weight_files(folder: Path) -> dict[Path, tuple[str, ...] | None]:
    """The safetensors files that hold the weights, whether they are there or not.

    As transformers chooses: `model.safetensors`, else the files that the index names, and what
    lies beside them counts for nothing. Without either, all shards, or all files.

    Returns:
        For each file the tensors that the index promises in it; None where no index says.

    Raises:
        ModelNotFoundError: the folder holds no safetensors at all.
        UnsupportedModelError: it holds weights of another format.
        ModelError: the index is malformed.
    """
    if _lies_in(folder, "model.safetensors"):
        return {folder / "model.safetensors": None}
    if _lies_in(folder, INDEX):
        return _files_of_index(folder / INDEX)
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise _no_weights(folder)
    matches = [match for path in found if (match := _SHARD.fullmatch(path.name))]
    if not matches:
        return dict.fromkeys(found)
    return {
        folder / f"{stem}-{number:05}-of-{total}.safetensors": None
        for stem, total in sorted({(match["stem"], match["total"]) for match in matches})
        for number in range(1, int(total) + 1)
    }


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a model needs and `folder` lacks."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).exists()]
    try:
        return missing + [path.name for path in weight_files(folder) if not path.exists()]
    except ModelError:  # none, or of another format
        return [*missing, "*.safetensors"]


def _lies_in(folder: Path, name: str) -> bool:
    """Also a link that leads nowhere, which is better named than overlooked."""
    return (folder / name).exists() or (folder / name).is_symlink()


def _files_of_index(index: Path) -> dict[Path, tuple[str, ...] | None]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index} holds no weight_map of tensor names to file names")
    files: dict[Path, tuple[str, ...] | None] = {}
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise ModelError(f"{index} places the tensor {tensor!r} in {name!r}, no file name")
        path = index.with_name(name)
        files[path] = (*(files.get(path) or ()), tensor)
    return dict(sorted(files.items()))


def _no_weights(folder: Path) -> ModelError:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return UnsupportedModelError(
            f"{folder} holds its weights as pickle alone ({pickles[0]}), which is not read because "
            "opening a pickle runs whatever code is in it. If you trust the file, convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)"
        )
    if gguf := sorted(folder.glob("*.gguf")):
        return ModelNotFoundError(
            f"{folder} holds no *.safetensors; for its GGUF file give the path {gguf[0]}"
        )
    return ModelNotFoundError(
        f"{folder} holds no weights: a model folder needs *.safetensors beside config.json"
    )
