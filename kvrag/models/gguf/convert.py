"""GGUF to a Hugging Face folder, once: float32 weights, config and tokenizer rebuilt.

What llama.cpp's converter changed is changed back, so that the folder is the one the file was made
from, up to quantisation. The folder appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvrag.errors import ModelError
from kvrag.models.file_parts import FileParts
from kvrag.models.gguf.config import hf_config
from kvrag.models.gguf.file import GGUFFile
from kvrag.models.gguf.metadata import Metadata
from kvrag.models.gguf.tensors import rope_tensors, weight_sources
from kvrag.models.gguf.tokenizer import gguf_tokenizer, tokenizer_options
from kvrag.models.safetensors_writer import write_weights

__all__ = ["convert_gguf"]

#: Part of the folder's name: raise it when the conversion changes.
_CONVERTER_VERSION = 2


def convert_gguf(source: Path | FileParts, models_dir: Path) -> Path:
    """The folder under `models_dir` that holds a GGUF file converted; made when it is not there.

    Raises:
        ModelNotFoundError: no such file.
        ModelError: no GGUF, or a damaged one.
        UnsupportedModelError: an architecture, key, tensor, tokenizer or quantisation that is
            refused by name.
    """
    file = FileParts(source.name, (source,)) if isinstance(source, Path) else source
    stem = Path(file.name).stem
    folder = models_dir / f"{stem}-v{_CONVERTER_VERSION}-{file.digest()[:16]}"
    if folder.exists():
        return folder
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _locked(models_dir):
            # Whoever waited finds the work done; whoever was killed left a part behind.
            for leftover in models_dir.glob(".*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            if not folder.exists():
                _convert(file, folder)
    except OSError as exc:
        raise ModelError(
            f"{file.name} cannot be converted into {models_dir}: {exc.strerror}"
        ) from exc
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _convert(file: FileParts, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir()
    try:
        with file.whole(partial) as path:
            _write(path, partial)
        _sync(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(path: Path, folder: Path) -> None:
    """Everything is checked before the weights, which take most of the time, are written."""
    file = GGUFFile(path)
    metadata = Metadata(path.name, file.fields)
    config = hf_config(metadata, file.tensors, rope_tensors(file, metadata.architecture))
    weights = weight_sources(file, metadata.architecture, config)
    gguf_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    options = tokenizer_options(metadata)
    for name, content in (("config.json", config), ("tokenizer_config.json", options)):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    write_weights(weights, folder)


def _sync(folder: Path) -> None:
    """All files and the folder on the disk before the folder gets its name."""
    for path in (*folder.iterdir(), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
